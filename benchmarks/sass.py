"""Machine code of a cubin as nvdisasm lists it: kernels, their instructions, and the loops these are in.

A loop is what control flow can go round: the instructions that reach each other, whatever their addresses, so that code
which the compiler moved behind the kernel's end counts where it belongs. What leaves a loop for good is no part of it.
Left out are the copies of shuffles and barriers for warps that have diverged (targets of BRA.DIV), which run rarely.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

INTEGER_RECIPROCAL = r"U?I2F\.(?:\w+\.)*RP\b"
"""What an integer division begins with: the divisor in fp32, rounded up, so that the quotient is never too large."""

DIVISION_ROUTINE = r"__cuda_sm\d+_(?:div|rem)_[su]\d+"

_SECTION = re.compile(r"^\s*\.section\s+\.(text|nv\.constant2)\.([^\s,]+),.*$", re.MULTILINE)
_LINE = re.compile(r"^(?:(\S+):|\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^;{}]+?)\s*;.*)$", re.MULTILINE)
_TABLE = re.compile(r"U?LDC\S* (U?R\d+), c\[0x2\]\[U?R\w+(?:\+0x([0-9a-f]+))?\]")


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers; text: opcode and operands; target: index of the instruction that a branch or call
    names, if it is in this kernel."""

    text: str
    predicated: bool
    target: int | None

    @property
    def opcode(self) -> str:
        return self.text.split(maxsplit=1)[0]


@dataclass(frozen=True)
class Loop:
    """body: indices of its instructions, those of inner loops included."""

    body: frozenset[int]
    inner: tuple["Loop", ...]

    def walk(self) -> Iterator["Loop"]:
        """The loop and all inside it."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


@dataclass(frozen=True)
class Kernel:
    """name: mangled; routines: index of the first instruction of each function that the compiler put behind the
    kernel, by name; jumps: targets of each indirect branch."""

    name: str
    code: tuple[Instruction, ...]
    routines: dict[str, int]
    jumps: dict[int, tuple[int, ...]]

    def count(self, pattern: str, body: frozenset[int] | None = None) -> int:
        """Instructions whose opcode begins with the pattern, in the whole kernel or in a loop."""
        where = range(len(self.code)) if body is None else body
        return sum(re.match(pattern, self.code[i].opcode) is not None for i in where)

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops, in the order of their code."""
        return _loops(self._reached(0), {0}) if self.code else ()

    def innermost(self, pattern: str) -> list[Loop]:
        """Loops that hold an instruction of this pattern, while no loop inside them does."""
        all_loops = [loop for outer in self.loops for loop in outer.walk()]
        holding = [loop for loop in all_loops if self.count(pattern, loop.body)]
        return [loop for loop in holding if not any(inner in holding for inner in list(loop.walk())[1:])]

    def length(self, loop: Loop) -> int:
        return len(loop.body) - self.count("NOP", loop.body)

    def divisions(self, loop: Loop) -> int:
        """Integer divisions and remainders of 16, 32 and 64 bits, inlined or called."""
        calls = (self.code[i] for i in loop.body if self.code[i].opcode.startswith("CALL"))
        return self.count(INTEGER_RECIPROCAL, loop.body) + sum(self._divides(call) for call in calls)

    def _divides(self, call: Instruction) -> bool:
        if re.search(DIVISION_ROUTINE, call.text):
            return True
        routine = self._reached(call.target) if call.target in self.routines.values() else ()
        return bool(self.count(INTEGER_RECIPROCAL, frozenset(routine)))

    def _reached(self, start: int) -> dict[int, tuple[int, ...]]:
        """The instructions that control flow reaches from one of them, each with those that may follow it."""
        edges, pending = {}, [start]
        while pending:
            at = pending.pop()
            if at not in edges:
                edges[at] = self._successors(at)
                pending += edges[at]
        return edges

    def _successors(self, at: int) -> tuple[int, ...]:
        instruction, following = self.code[at], (at + 1,) if at + 1 < len(self.code) else ()
        kind = instruction.opcode.split(".")[0]
        if kind in ("EXIT", "RET", "KILL"):
            return following if instruction.predicated else ()
        if kind in ("BRX", "BRXU", "JMX", "JMXU"):
            return self.jumps.get(at, ()) + (following if instruction.predicated else ())
        if kind not in ("BRA", "JMP") or ".DIV" in instruction.opcode or instruction.target is None:
            return following
        conditional = instruction.predicated or "," in instruction.text or ".U" in instruction.opcode
        return (instruction.target, *following) if conditional else (instruction.target,)


def kernels(listing: str) -> list[Kernel]:
    """The kernels in the output of `nvdisasm -ndf`."""
    sections = {}
    parts = _SECTION.split(listing)[1:]
    for kind, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        sections[kind, name] = text.split("\n//-----", 1)[0]
    return [
        _kernel(name, text, sections.get(("nv.constant2", name), ""))
        for (kind, name), text in sections.items()
        if kind == "text"
    ]


def _kernel(name: str, text: str, tables: str) -> Kernel:
    labels, addresses, lines = {}, {}, []
    for label, address, predicate, instruction in _LINE.findall(text):
        if label:
            labels[label] = len(lines)
        else:
            addresses[int(address, 16)] = len(lines)
            lines.append((instruction, bool(predicate)))
    code = []
    for instruction, predicated in lines:
        named = re.search(r"`\((\S+)\)", instruction)
        code.append(Instruction(instruction, predicated, labels.get(named[1]) if named else None))
    routines = {label: at for label, at in labels.items() if not label.startswith(".") and label != name}
    return Kernel(name, tuple(code), routines, _jumps(code, addresses, tables))


def _jumps(code: list[Instruction], addresses: dict[int, int], tables: str) -> dict[int, tuple[int, ...]]:
    """Targets of indirect branches. Each one's table of addresses begins where the branch loads from and ends where
    the next one begins."""
    data = bytes(int(byte, 16) for row in re.findall(r"\.byte\s+(.*)", tables) for byte in row.split(","))
    loads = [(at, m[1], int(m[2] or "0", 16)) for at, i in enumerate(code) if (m := _TABLE.match(i.text))]
    starts = [*sorted({offset for _, _, offset in loads}), len(data)]
    jumps = {}
    for at, instruction in enumerate(code):
        branch = re.match(r"(?:BRX|JMX)U?\S* (U?R\d+)", instruction.text)
        before = [offset for load, register, offset in loads if branch and load < at and register == branch[1]]
        if before:
            end = next(start for start in starts if start > before[-1])
            words = (int.from_bytes(data[i : i + 4], "little") for i in range(before[-1], end, 4))
            jumps[at] = tuple(addresses[word] for word in words if word in addresses)
    return jumps


def _loops(edges: dict[int, tuple[int, ...]], entries: set[int]) -> tuple[Loop, ...]:
    """Loops of a graph: its strongly connected parts. Without the edges back to where such a part is entered, the parts
    of that part are the loops inside it."""
    found = []
    for part in _connected(edges):
        heads = {to for at in edges if at not in part for to in edges[at] if to in part} | (entries & part)
        inside = {at: tuple(to for to in edges[at] if to in part and to not in heads) for at in part}
        found.append(Loop(frozenset(part), _loops(inside, set())))
    return tuple(sorted(found, key=lambda loop: min(loop.body)))


def _connected(edges: dict[int, tuple[int, ...]]) -> list[set[int]]:
    """Strongly connected parts that hold an edge (Tarjan 1972, without recursion)."""
    order, low, stack, on_stack, parts = {}, {}, [], set(), []
    for root in edges:
        if root in order:
            continue
        work = [(root, iter(edges[root]))]
        while work:
            at, successors = work[-1]
            if at not in order:
                order[at] = low[at] = len(order)
                stack.append(at)
                on_stack.add(at)
            step = next((to for to in successors if to not in order or to in on_stack), None)
            if step is not None and step not in order:
                work.append((step, iter(edges[step])))
                continue
            if step is not None:
                low[at] = min(low[at], order[step])
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[at])
            if low[at] == order[at]:
                part = set(stack[stack.index(at) :])
                del stack[-len(part) :]
                on_stack -= part
                if len(part) > 1 or at in edges[at]:
                    parts.append(part)
    return parts
