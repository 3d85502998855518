"""Pages of the RPC methods, from the comments of a contract and an example in Python of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_METHOD = re.compile(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);")
_FIELD = re.compile(r"((?:repeated|optional) )?(map<[^>]+>|[\w.]+) (\w+) = \d+;(?: // (.*))?")
_VALUE = re.compile(r"([A-Z]\w*) = \d+;")
_OPEN = re.compile(r"(message|enum|service) (\w+) \{(\})?")


@dataclass
class Entry:
    """A method of a service, a field of a message or a value of an enum."""

    name: str
    type: str
    comment: str
    takes: str = ""
    returns: str = ""


@dataclass
class Declaration:
    """A service, message or enum with its comment and entries."""

    what: str
    name: str
    comment: str
    entries: list[Entry] = field(default_factory=list)


def declarations(contract: Path) -> dict[str, Declaration]:
    """Return all declarations of a contract by name, those inside a message too."""
    found: dict[str, Declaration] = {}
    inside: list[Declaration] = []
    comments: list[str] = []
    for line in map(str.strip, contract.read_text().splitlines()):
        if line.startswith("//"):
            comments.append(line.removeprefix("//").strip())
            continue
        comment = " ".join(comments)
        if opened := _OPEN.match(line):
            what, name, closed = opened.groups()
            found[name] = Declaration(what, name, comment)
            if not closed:
                inside.append(found[name])
        elif line.startswith("oneof "):
            inside.append(inside[-1])
        elif line == "}":
            inside.pop()
        elif inside and (entry := _entry(line, comment)):
            inside[-1].entries.append(entry)
        comments = []
    return found


def _entry(line: str, comment: str) -> Entry | None:
    if method := _METHOD.match(line):
        name, in_stream, takes, out_stream, returns = method.groups()
        form = f"{in_stream or ''}{takes} → {out_stream or ''}{returns}"
        return Entry(name, form, comment, takes, returns)
    if found := _FIELD.match(line):
        label, type_, name, beside = found.groups()
        text = " ".join(part for part in (comment, beside) if part)
        return Entry(name, f"{label or ''}{type_}", text)
    if value := _VALUE.match(line):
        return Entry(value[1], "", comment)
    return None


def method_page(method: Entry, known: dict[str, Declaration], example: str) -> str:
    """Return the page of one method: its comment, an example, its messages."""
    parts = [
        f"# {method.name}",
        f"`{method.type}`",
        method.comment,
        f"## Example\n\n```python\n{example}```",
    ]
    for title, name in (("Request", method.takes), ("Response", method.returns)):
        parts.append(f"## {title}: {name}\n\n{_body(known[name], known)}")
    return "\n\n".join(parts) + "\n"


def service_page(service: Declaration, title: str, links: bool, text: str) -> str:
    """Return the page of a service: a table of its methods."""
    rows = [f"# {title}", text, "| method | returns |", "|---|---|"]
    for one in service.entries:
        name = f"[`{one.name}`]({page_of(one.name)})" if links else f"`{one.name}`"
        rows.append(f"| {name} | {_cell(one.comment)} |")
    return "\n\n".join(rows[:2]) + "\n\n" + "\n".join(rows[2:]) + "\n"


def messages_page(known: dict[str, Declaration]) -> str:
    """Return the page of the messages and enums that are no request or response of one method."""
    methods = [one for each in known.values() if each.what == "service" for one in each.entries]
    own = {name for one in methods for name in (one.takes, one.returns)}
    parts = ["# Messages", "Types of fields of requests and responses."]
    for each in known.values():
        if each.what != "service" and each.name not in own:
            parts += [f"## {each.name}", each.comment, _body(each, known)]
    return "\n\n".join(part for part in parts if part) + "\n"


def page_of(method: str) -> str:
    """Return the name of a method's page: ``denoise-stream.md`` of ``DenoiseStream``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", method).lower() + ".md"


def _body(one: Declaration, known: dict[str, Declaration]) -> str:
    if not one.entries:
        return "No fields."
    rows = ["| value | meaning |", "|---|---|"]
    if one.what == "message":
        rows = ["| field | type | meaning |", "|---|---|---|"]
    for entry in one.entries:
        type_ = f" {_type(entry.type, known)} |" if one.what == "message" else ""
        rows.append(f"| `{entry.name}` |{type_} {_cell(entry.comment)} |")
    return "\n".join([*([one.comment, ""] if one.comment else []), *rows])


def _type(text: str, known: dict[str, Declaration]) -> str:
    *label, name = text.split(" ")
    methods = [one for each in known.values() if each.what == "service" for one in each.entries]
    own = {one for each in methods for one in (each.takes, each.returns)}
    linked = f"[{name}](messages.md#{name.lower()})" if name in known.keys() - own else name
    return " ".join([*label, linked]).replace("<", "&lt;")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
