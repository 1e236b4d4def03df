"""Mutations of the project's files, as a hostile hand or a bad disk makes them: each a function of a `random.Random`.

A folder is a dict of bytes by file name. The hash of the weights is written anew in most cases: whoever changes a file
can do that.
"""

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator

Folder = dict[str, bytes]

NUMBERS = (0, -1, 1, 2, 3, 64, 65, 127, -5, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400)
FLOATS = (0.5, -0.0, 1e308, -1e308, 1e-320, 1e39, float("inf"), float("nan"))
OTHERS = (
    None,
    True,
    False,
    "",
    "x",
    "nan",
    "weight",
    "batch",
    "\ud800",
    [],
    {},
    [[]],
    {"value": "x"},
    {"number": "nan"},
)


def odd_value(r: random.Random) -> object:
    """Something that is not what belongs here."""
    kind = r.randrange(8)
    if kind < 4:
        return r.choice(NUMBERS)
    if kind == 4:
        return r.choice(FLOATS)
    if kind == 5:
        return r.choice(OTHERS)
    if kind == 6:
        return [r.choice(NUMBERS) for _ in range(r.randrange(1, 6))]
    deep: object = r.choice(NUMBERS)
    for _ in range(r.choice((2, 5, 40, 700))):
        deep = [deep] if r.random() < 0.5 else {"a": deep}
    return deep


def places(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every node of a JSON tree but its root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def node(tree: object, path: tuple) -> object:
    for key in path:
        tree = tree[key]
    return tree


def near(r: random.Random, value: object) -> object:
    """A value like the one that is there, so that the change gets past the first checks."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice((value + 1, value - 1, value * 2, value // 2, -value, value + 64, r.choice(NUMBERS)))
    if isinstance(value, float):
        return r.choice((-value, value * 1e30, r.choice(FLOATS), int(value) if abs(value) < 1e300 else 0))
    if isinstance(value, str):
        return value[: r.randrange(len(value))] if value and r.random() < 0.5 else value + "_1"
    return odd_value(r)


def change_tree(r: random.Random, tree: object) -> object:
    """One change of a JSON tree: a value, a key, an element dropped, doubled, moved, or put elsewhere."""
    tree = copy.deepcopy(tree)
    paths = list(places(tree))
    if not paths:
        return odd_value(r)
    *parents, key = path = r.choice(paths)
    parent, value = node(tree, tuple(parents)), node(tree, path)
    action = r.randrange(7)
    if action == 0:
        parent[key] = odd_value(r)
    elif action in (1, 2):
        parent[key] = near(r, value)
    elif action == 3:
        del parent[key]
    elif action == 4:  # what stands elsewhere: a weight in the place of another, one step's arguments in another's
        alike = [p for p in r.sample(paths, min(len(paths), 60)) if type(node(tree, p)) is type(value)]
        parent[key] = copy.deepcopy(node(tree, r.choice(alike or paths)))
    elif isinstance(parent, list):
        if action == 5:
            parent.insert(r.randrange(len(parent) + 1), copy.deepcopy(value))
        else:
            other = r.randrange(len(parent))
            parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[str(key) + "_1" if action == 5 else str(odd_value(r))[:100]] = parent.pop(key)
    return tree


def to_json(r: random.Random, tree: object) -> bytes:
    text = json.dumps(tree)
    if r.random() < 0.03:  # a key twice
        text = text.replace('": ', '": 1, "format": ', 1)
    return text.encode()


def change_bytes(r: random.Random, data: bytes) -> bytes:
    action = r.randrange(5)
    if action == 0:
        return data[: r.randrange(len(data) + 1)]
    if action == 1:
        return data + r.randbytes(r.choice((1, 4, 64)))
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 16))):
        if changed:
            changed[r.randrange(len(changed))] = r.randrange(256)
    if action == 2 and len(changed) > 8:
        changed[:8] = struct.pack("<Q", r.choice((0, 1, len(data), 2**31, 2**63, 2**64 - 1)))
    return bytes(changed)


def change_header(r: random.Random, data: bytes) -> bytes:
    """One change of a safetensors file's header; often one that keeps the number of bytes."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[r.choice(names)]
    action = r.randrange(5)
    if action == 0 and entry["shape"]:  # as many elements
        shape = entry["shape"]
        i, j = r.randrange(len(shape)), r.randrange(len(shape))
        if shape[i] % 2 == 0 and i != j:
            shape[i], shape[j] = shape[i] // 2, shape[j] * 2
        elif r.random() < 0.5:
            shape.insert(0, 1)
        else:
            shape.reverse()
    elif action == 1:  # as many bytes
        alike = {"F32": "I32", "I32": "F32", "I8": "U8", "I64": "F64"}
        entry["dtype"] = alike.get(entry["dtype"], "F32")
    elif action == 2:  # two tensors change places
        other = header[r.choice(names)]
        for field in ("shape", "data_offsets"):
            entry[field], other[field] = other[field], entry[field]
    elif action == 3 and rest:  # shorter or longer, and the file with it
        factor = {"F32": 4, "I32": 4, "I64": 8}.get(entry["dtype"], 1)
        first, last = entry["data_offsets"]
        count = (last - first) // factor
        wanted = max(count + r.choice((-1, 1, -count + 1, count)), 0)
        change = (wanted - count) * factor
        rest = rest[: max(first, last + min(change, 0))] + bytes(max(change, 0)) + rest[last:]
        entry["shape"] = [wanted]
        for value in header.values():
            if "data_offsets" in value and value["data_offsets"][0] >= last:
                value["data_offsets"] = [offset + change for offset in value["data_offsets"]]
        entry["data_offsets"] = [first, last + change]
    else:
        header = change_tree(r, header)
    text = to_json(r, header)
    return struct.pack("<Q", len(text)) + text + rest


def change_json(r: random.Random, data: bytes) -> bytes:
    return to_json(r, change_tree(r, json.loads(data)))


def mutated(r: random.Random, folder: Folder, manifest: str) -> Folder:
    """`folder` with one to three changes; `manifest`: the file that names the weights' hash."""
    folder, documents = dict(folder), [name for name in folder if name.endswith(".json")]
    weights = next(name for name in folder if name.endswith(".safetensors"))
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        kind = r.randrange(12)
        try:
            change, name = _change(r, kind, documents, weights)
            folder[name] = change(r, folder[name])
        except (ValueError, RecursionError, TypeError, AttributeError, LookupError):
            continue  # what an earlier change left is no JSON any more
    if r.random() < 0.95:
        folder[manifest] = rehashed(folder[manifest], folder[weights])
    return folder


def _change(r: random.Random, kind: int, documents: list[str], weights: str) -> tuple[Callable, str]:
    if kind < 7:
        return change_json, r.choice(documents)
    if kind < 10:
        return change_header, weights
    return change_bytes, weights if kind == 10 else r.choice(documents)


def rehashed(manifest: bytes, weights: bytes) -> bytes:
    try:
        raw = json.loads(manifest)
        raw["sha256"] = hashlib.sha256(weights).hexdigest()
        return json.dumps(raw).encode()
    except (ValueError, TypeError, RecursionError):
        return manifest
