"""A denoiser as a module of torch: values, derivatives under every transform, and bad input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.support import onnx_models
from tests.support.denoisers import random_images
from tests.support.models_folder import DOCUMENTS, LABELS, SHAPE, tiny_bank, write_models
from torch import Tensor
from torch.autograd import forward_ad

from els_client import AsyncClient, ElsError, InvalidArgumentError, NotFoundError
from els_client.torch import LocalClient, LocalDenoiser, RemoteDenoiser
from els_kernels import GEOMETRIES
from els_kernels.reference import Reference

# torch compiles decompositions by it when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

SIGMA, LEVELS = 0.8, (0.8, 2.0)
X, G = random_images((2, *SHAPE), 1), random_images((2, *SHAPE), 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("zeros", "ideal", "gaussian")
    documents = {name: DOCUMENTS[name] for name in names}
    root = write_models(tmp_path_factory.mktemp("local") / "models", documents)
    onnx_models.write(root / "onnx", onnx_models.gaussian())
    return root


@pytest.fixture(scope="module")
def ideal(root: Path) -> LocalDenoiser:
    return LocalDenoiser(root / "ideal")


def exact(x: Tensor, sigma: float | Tensor = SIGMA) -> Tensor:
    """The posterior mean over the images of the bank, in float64."""
    bank = tiny_bank().pixels().double().flatten(1)
    distances = (x.double().flatten(1)[:, None] - bank).square().sum(-1)
    variance = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1) ** 2
    return (torch.softmax(-distances / (2 * variance), 1) @ bank).reshape(x.shape)


def close(got: Any, want: Tensor, budget: float = 2e-5) -> None:
    want = want.to(got)
    torch.testing.assert_close(got, want, rtol=0, atol=budget * max(1.0, float(want.abs().max())))


def test_it_returns_the_posterior_mean_of_each_image_at_its_level(ideal: LocalDenoiser) -> None:
    want = exact(X, torch.tensor(LEVELS))
    levels = torch.tensor(LEVELS)
    for level in (LEVELS, np.array(LEVELS), levels, levels[:, None, None, None]):
        close(ideal(X, level), want)
    close(ideal(X, torch.tensor(SIGMA)), exact(X))
    a = 0.6
    close(ideal(X, alpha_bar=a**2), exact(X / a, 0.8 / a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_and_gradients_keep_their_dtype(ideal: LocalDenoiser, dtype: torch.dtype) -> None:
    x = X.to(dtype, copy=True).requires_grad_()
    denoised = ideal(x, SIGMA)
    (gradient,) = torch.autograd.grad(denoised, x, G.to(dtype))
    assert denoised.dtype == gradient.dtype == dtype
    close(denoised.float(), exact(x.detach()), 1e-2)


def test_labels_are_those_of_the_call_else_of_the_module(root: Path) -> None:
    labelled = LocalDenoiser(root / "ideal", label=2)
    client, name = labelled.client, labelled.model
    want = torch.from_numpy(client.denoise(X, model=name, sigma=SIGMA, label=[2, 2]))
    assert torch.equal(labelled(X, SIGMA), want)
    other = torch.from_numpy(client.denoise(X, model=name, sigma=SIGMA, label=[0, 1]))
    assert torch.equal(labelled(X, SIGMA, torch.tensor([0, 1])), other)
    assert torch.equal(RemoteDenoiser(client, name)(X, SIGMA, label=[0, 1]), other)
    assert labelled.info.label_count == LABELS


def test_products_agree_with_finite_differences_in_float64(ideal: LocalDenoiser) -> None:
    step, along = 1e-5, G.double()
    ahead, behind = (exact(X.double() + sign * step * along) for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    close(torch.func.jvp(lambda x: ideal(x, SIGMA), (X,), (G,))[1], difference)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ideal(x, SIGMA), x, G)
    # Jᵀg·u = g·J u for every u, and J of this machine is symmetric.
    close(gradient, difference)


def test_gradients_of_an_els_machine_are_those_of_the_reference(root: Path) -> None:
    reference = Reference(tiny_bank().pixels())
    window = 3

    def specified(x: Tensor) -> Tensor:
        ranges = [(0, 12)] * len(x)
        geometry = GEOMETRIES["els", "zeros"]
        return reference(x, [1.0] * 2, list(LEVELS), [window] * 2, ranges, geometry).mean

    denoiser = LocalDenoiser(root / "zeros", window=window)
    x = X.clone().requires_grad_()
    denoised, want = denoiser(x, LEVELS), specified(x)
    close(denoised.detach(), want.detach())
    for cotangent in (G, X):
        (got,) = torch.autograd.grad(denoised, x, cotangent, retain_graph=True)
        close(got, torch.autograd.grad(want, x, cotangent, retain_graph=True)[0], 5e-5)


def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (f(x) * G).sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "vjp": lambda f: torch.func.vjp(f, X)[1](G)[0],
    "grad": lambda f: torch.func.grad(scalar(f))(X),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (G,))[1],
    "jacfwd": lambda f: torch.func.jacfwd(f)(X),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([X, G, -X])),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(scalar(f)))(torch.stack([X, G])),
    "transposed vjp": lambda f: torch.func.vjp(lambda g: torch.func.vjp(f, X)[1](g)[0], G)[1](X)[0],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_func_gives_the_derivative(ideal: LocalDenoiser, name: str) -> None:
    transform = TRANSFORMS[name]
    close(transform(lambda x: ideal(x, SIGMA)), transform(exact))
    with torch.no_grad():
        close(transform(lambda x: ideal(x, SIGMA)), transform(exact))


def test_levels_and_labels_are_repeated_with_their_images_under_vmap(root: Path) -> None:
    denoiser = LocalDenoiser(root / "ideal", label=[0, 1])
    levels = torch.tensor(LEVELS)
    got = torch.func.jacrev(lambda x: denoiser(x, levels))(X)
    for b in range(2):
        alone = functools.partial(denoiser, sigma=levels[b], label=b)
        row = torch.func.jacrev(alone)(X[b : b + 1])
        close(got[b, :, :, :, b], row[0, :, :, :, 0], 0)
    each = torch.stack([X, G, X])
    together = torch.func.vmap(lambda x, s: denoiser(x, s))(each, torch.tensor([0.5, 1.0, 2.0]))
    for x, s, found in zip(each, (0.5, 1.0, 2.0), together, strict=True):
        assert torch.equal(found, denoiser(x, s))


def test_forward_mode_gives_the_derivative(ideal: LocalDenoiser) -> None:
    make: Any = forward_ad.make_dual
    unpack: Any = forward_ad.unpack_dual
    want = torch.func.jvp(exact, (X,), (G,))[1]
    with forward_ad.dual_level():
        close(unpack(ideal(make(X, G), SIGMA)).tangent, want)


def test_gradients_at_one_point_share_the_first_pass(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = LocalDenoiser(root / "zeros")
    client = denoiser.client
    assert isinstance(client, LocalClient)
    passes: list[int] = []
    first = client._denoiser.evidence

    def counted(query: Any) -> Any:
        passes.append(len(query))
        return first(query)

    monkeypatch.setattr(client._denoiser, "evidence", counted)
    x = X.clone().requires_grad_()
    denoised = denoiser(x, SIGMA)
    found = [torch.autograd.grad(denoised, x, g, retain_graph=True)[0] for g in (G, X, G)]
    assert passes == [2]
    alone = client.vjp(X, G, model="zeros", sigma=SIGMA)[1]
    assert torch.equal(found[0], found[2])
    assert found[0].numpy().tobytes() == alone.tobytes()


def test_a_row_has_the_same_bits_alone_and_in_company(ideal: LocalDenoiser) -> None:
    x = random_images((5, *SHAPE), 3).requires_grad_()
    together = ideal(x, SIGMA)
    (gradient,) = torch.autograd.grad(together.square().sum(), x)
    for b in range(5):
        row = x[b : b + 1].detach().requires_grad_()
        alone = ideal(row, SIGMA)
        assert torch.equal(alone[0], together[b])
        assert torch.equal(torch.autograd.grad(alone.square().sum(), row)[0][0], gradient[b])


def test_derivatives_that_no_server_has_are_errors(ideal: LocalDenoiser) -> None:
    x, level = X.clone().requires_grad_(), torch.tensor(SIGMA, requires_grad=True)
    with pytest.raises(RuntimeError, match="level: expected one without a gradient"):
        torch.autograd.grad(ideal(x, level).sum(), x)
    with pytest.raises(RuntimeError, match="level: expected one without a gradient"):
        torch.autograd.grad(ideal(X, level).sum(), level)
    with pytest.raises(RuntimeError, match="level: expected one without a gradient"):
        torch.func.jvp(lambda s: ideal(X, s), (level.detach(),), (torch.ones(()),))
    (once,) = torch.autograd.grad(ideal(x, SIGMA).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives, got a second"):
        torch.autograd.grad(once.sum(), x)
    with pytest.raises(RuntimeError, match="expected first derivatives, got a second"):
        torch.func.hessian(scalar(lambda z: ideal(z, SIGMA)))(X)


def test_a_model_without_gradients_denoises_and_names_itself_in_backward(root: Path) -> None:
    denoiser = LocalDenoiser(root / "onnx" / "model")
    x = torch.ones(1, *onnx_models.SHAPE, requires_grad=True)
    denoised = denoiser(x, 1.0)
    close(denoised.detach(), x.detach() / 2)
    with pytest.raises(ElsError, match="model has no gradients: a model of kind onnx") as raised:
        torch.autograd.grad(denoised.sum(), x)
    assert raised.value.code == "FAILED_PRECONDITION"


BAD: dict[str, tuple[Callable[[LocalDenoiser], object], type[Exception], str]] = {
    "shape": (lambda d: d(torch.zeros(1, 1, 4, 4), 1.0), InvalidArgumentError, r"\[B, 1, 6, 5\]"),
    "rank": (lambda d: d(torch.zeros(6, 5), 1.0), InvalidArgumentError, r"\[B, C, H, W\]"),
    "level": (lambda d: d(X, 0.0), InvalidArgumentError, "level.sigma: expected s/a from"),
    "levels": (lambda d: d(X, [1.0, 2.0, 3.0]), InvalidArgumentError, "level: expected 1 value or"),
    "pixels": (lambda d: d(X * float("nan"), 1.0), InvalidArgumentError, "finite pixels"),
    "label": (lambda d: d(X, 1.0, label=7), InvalidArgumentError, "label"),
    "no level": (lambda d: d(X), TypeError, "expected sigma or alpha_bar, got none"),
    "two levels": (lambda d: d(X, 1.0, alpha_bar=0.5), TypeError, "got both"),
    "array": (lambda d: d(X.numpy(), 1.0), TypeError, "x: expected a tensor, got ndarray"),
    "version": (lambda d: d(X, 1.0, version="7"), NotFoundError, "version: expected 1, got '7'"),
    "model": (lambda d: RemoteDenoiser(d.client, "other"), NotFoundError, "got 'other'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_rejected_by_its_field(ideal: LocalDenoiser, name: str) -> None:
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call(ideal)


async def test_an_asyncio_client_is_rejected() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="expected Client or LocalClient, got AsyncClient"):
            RemoteDenoiser(cast("Any", client), "zeros")


def test_a_folder_that_is_no_model_is_an_error_of_the_client(tmp_path: Path) -> None:
    with pytest.raises(ElsError, match="expected a file") as raised:
        LocalDenoiser(tmp_path / "nothing")
    assert raised.value.code == "FAILED_PRECONDITION"


def test_a_module_says_which_model_it_is(ideal: LocalDenoiser) -> None:
    assert repr(ideal) == "LocalDenoiser('ideal', kind='analytic', shape=(1, 6, 5))"
    assert list(ideal.parameters()) == []
