"""Documents that are no model.yaml, with what each must be refused for."""

from __future__ import annotations

BANK = "bank: ../_banks/tiny.safetensors\n"
ELS = f"kind: analytic\nmachine: els\n{BANK}"
GAUSSIAN = "kind: gaussian\nshape: [2, 3, 4]\n"
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
"""Eleven lines that stand for 10¹² values."""

MALFORMED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "document: "),
    "a list": ("[1, 2]", "document: "),
    "truncated": ("kind: analytic\nmachine: {els", "expected YAML"),
    "no text": (b"kind: \x80\x81", "expected YAML"),
    "an object": ("!!python/object/apply:os.getcwd []", "expected YAML"),
    "an impossible date": ("kind: 2001-13-01", "expected YAML"),
    "an impossible truth": ("kind: !!bool perhaps", "expected YAML"),
    "an impossible number": ("kind: !!int ''", "expected YAML"),
    "an impossible time": ("kind: !!timestamp never", "expected YAML"),
    "an endless number": (f"kind: {'9' * 5000}", "expected YAML"),
    "nested without end": ("[" * 20_000, "expected YAML"),
    "aliases without end": (f"{ALIASES}kind: wiener\nbank: x\n", "with aliases expanded"),
    "a kind without end": (f"{ALIASES}kind: *a11\nbank: x\n", "with aliases expanded"),
    "a mapping merged without end": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))
        + "kind: wiener\nbank: x\n",
        "with aliases expanded",
    ),
    "a long text through aliases": (
        f"t: &t {'x' * 50_000}\nkind: [{', '.join(['*t'] * 1000)}]\n",
        "with aliases expanded",
    ),
    "an alias of itself": ("kind: &a [*a]\n", "an alias of a node that contains it"),
    "an alias of what merges it": ("a: &a {<<: *a}\nkind: wiener\n", "an alias of a node"),
    "a text too long": (f"kind: {'x' * 70_000}\n", "a value of 70000 characters"),
    "a number in base sixty": (f"kind: {'1:' * 100_000}1\n", "a value of 200001 characters"),
    "a hexadecimal number": (f"kind: wiener\nbank: 0x{'f' * 9000}\n", "very many digits"),
    "a long alias": (f"kind: *{'x' * 500_000}\n", "found undefined alias"),
    "too large": (f"# {'x' * (1 << 20)}\n", "expected at most 1048576 bytes, got more"),
    "very many faults": (
        f"{ELS}" + "".join(f"k{i}: 1\n" for i in range(3000)),
        "and 2980 more faults",
    ),
    "no kind": (BANK, "kind"),
    "unknown kind": (f"kind: magic\n{BANK}", "'magic'"),
    "unknown machine": (f"kind: analytic\nmachine: magic\n{BANK}", "machine: "),
    "unknown padding": (f"{ELS}padding: mirror\n", "padding: "),
    "unknown schedule": (f"{ELS}schedule: linear\n", "schedule: "),
    "unknown key": (f"{ELS}windows: 3\n", "windows: extra inputs are not permitted"),
    "two faults": (f"{ELS}windows: 3\npadding: up\n", "padding: "),
    "no bank": ("kind: analytic\nmachine: els\n", "bank: field required"),
    "valid padding with local": (
        f"kind: analytic\nmachine: local\npadding: valid\n{BANK}",
        "got local with valid",
    ),
    "even window": (f"{ELS}window: 4\n", "window.k: expected odd numbers, got (4,)"),
    "window 0": (f"{ELS}window: 0\n", "window.k: expected odd numbers"),
    "negative window": (f"{ELS}window: -3\n", "window.k: expected odd numbers"),
    "window too large": (f"{ELS}window: 13\n", "window: expected at most 11 here, got 13"),
    "window of another word": (f"{ELS}window: automatic\n", "window"),
    "window true": (f"{ELS}window: true\n", "window"),
    "window table ragged": (
        f"{ELS}window: {{sigma: [1, 2], k: [3]}}\n",
        "window: expected as many k as sigma",
    ),
    "window table empty": (f"{ELS}window: {{sigma: [], k: []}}\n", "at least one"),
    "window table falling": (
        f"{ELS}window: {{sigma: [2, 1], k: [3, 5]}}\n",
        "window.sigma: expected increasing",
    ),
    "window table NaN": (f"{ELS}window: {{sigma: [.nan], k: [3]}}\n", "window.sigma: "),
    "window table even": (f"{ELS}window: {{sigma: [1], k: [2]}}\n", "window.k: "),
    "window table of words": (f"{ELS}window: {{sigma: [a], k: [3]}}\n", "window"),
    "window table with a third key": (
        f"{ELS}window: {{sigma: [1], k: [3], n: 2}}\n",
        "extra inputs are not permitted",
    ),
    "fold below the least": (
        f"{ELS}fold: 0.01\n",
        "fold: expected 0, at least 0.05, inf or uniform, got 0.01",
    ),
    "fold negative": (
        f"{ELS}fold: -1\n",
        "fold: expected 0, at least 0.05, inf or uniform, got -1",
    ),
    "fold NaN": (f"{ELS}fold: .nan\n", "fold: expected 0, at least 0.05, inf or uniform, got nan"),
    "fold true": (f"{ELS}fold: true\n", "fold"),
    "fold of another word": (f"{ELS}fold: flat\n", "fold"),
    "fold of whole images": (
        f"kind: analytic\nmachine: ideal\nfold: 0.2\n{BANK}",
        "for fold, sizes and padding inside, got ideal with zeros",
    ),
    "inside with whole images": (
        f"kind: analytic\nmachine: equivariant\npadding: inside\n{BANK}",
        "for fold, sizes and padding inside, got equivariant with inside",
    ),
    "valid fold with local": (
        f"kind: analytic\nmachine: local\npadding: valid\nfold: 1\n{BANK}",
        "got local with valid",
    ),
    "window too large inside": (
        f"{ELS}padding: inside\nwindow: 7\n",
        "window: expected at most 5 here, got 7",
    ),
    "sizes with local": (
        f"kind: analytic\nmachine: local\nsizes: any\n{BANK}",
        "sizes: expected none but for els, as other sources are the same place, got some for local",
    ),
    "sizes of another word": (f"{ELS}sizes: all\n", "sizes"),
    "sizes without width": (f"{ELS}sizes: {{height: [1, 9]}}\n", "width: field required"),
    "sizes without the bank's": (
        f"{ELS}sizes: {{height: [7, 9], width: [1, 9]}}\n",
        "sizes.height: expected lowest to highest, with the bank's 6 between them, got [7, 9]",
    ),
    "sizes falling": (
        f"{ELS}sizes: {{height: [1, 9], width: [9, 1]}}\n",
        "sizes.width: expected lowest to highest, with the bank's 5 between them, got [9, 1]",
    ),
    "sizes too large": (f"{ELS}sizes: {{height: [1, 9], width: [1, 5000]}}\n", "4096"),
    "sizes of three": (f"{ELS}sizes: {{height: [1, 9, 9], width: [1, 9]}}\n", "height"),
    "pca without a threshold of its rule": (
        f"kind: pca\nrule: released\n{BANK}",
        "threshold: expected a number, a table or thresholds.yaml with rule released, got auto",
    ),
    "pca with a threshold of 0": (
        f"kind: pca\nthreshold: 0.0\n{BANK}",
        "threshold.tau: expected above 0, at most 1, got 0.0",
    ),
    "pca with a ragged threshold": (
        f"kind: pca\nthreshold: {{sigma: [1.0], tau: [0.1, 0.2]}}\n{BANK}",
        "threshold: expected as many tau as sigma",
    ),
    "smoothed by less than nothing": (
        f"kind: smoothed\nsmoothing: -1.0\n{BANK}",
        "smoothing: ",
    ),
    "smoothed without draws": (f"kind: smoothed\nsmoothing: 1.0\ndraws: 0\n{BANK}", "draws: "),
    "pca in shards": (
        f"kind: pca\nshards: 2\n{BANK}",
        "shards: extra inputs are not permitted",
    ),
    "gaussian without mean": (f"{GAUSSIAN}variance: 1\n", "mean"),
    "gaussian of two axes": ("kind: gaussian\nshape: [2, 3]\nmean: 0\nvariance: 1\n", "shape"),
    "gaussian of no width": ("kind: gaussian\nshape: [2, 3, 0]\nmean: 0\nvariance: 1\n", "shape"),
    "gaussian too large": (
        "kind: gaussian\nshape: [1, 1000000000, 1000000000]\nmean: 0\nvariance: 1\n",
        "shape: expected at most",
    ),
    "gaussian beyond integers": (
        f"kind: gaussian\nshape: [1, {2**80}, 1]\nmean: 0\nvariance: 1\n",
        "shape: expected at most",
    ),
    "gaussian NaN": (f"{GAUSSIAN}mean: .nan\nvariance: 1\n", "mean: expected finite"),
    "gaussian negative": (f"{GAUSSIAN}mean: 0\nvariance: -1\n", "variance: expected >= 0"),
    "gaussian of three channels": (
        f"{GAUSSIAN}mean: [0, 0, 0]\nvariance: 1\n",
        "mean: expected something that broadcasts to [2, 3, 4], got shape [3, 1, 1]",
    ),
}
