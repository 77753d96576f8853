"""What a compiled program communicates, read off its text.

A collective in the body of a loop runs as often as the body. For loops over layers, micro-batches and chunks that is the
number that their condition compares their counter with. The loop over tokens ends when responses do: it is the "open" loop
here. Of the branches of a conditional the one that communicates least counts; in the sampler that is without top-k and top-p.
"""

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) .*\{$")
_CALLED = re.compile(r"(?:calls|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    result: str  # its type
    operation: str
    rest: str  # operands and attributes

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs."""
        if self.operation.endswith(("-done", "-update")):  # of what has been started
            return ()
        names = _CALLED.findall(self.rest)
        if self.operation == "call":
            names += re.findall(r"to_apply=%?([\w.-]+)", self.rest)
        for branches in _BRANCHES.findall(self.rest):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return tuple(names)

    @property
    def kind(self) -> str | None:
        """Which collective it is."""
        kind = self.operation.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def part(self) -> str | None:
        """A collective that is cut up to run beside computation carries the same name in each part."""
        found = re.search(r'(?:chain_id|async_collective_name)="[^"]*"', self.rest)
        return found and found[0]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each array of its result."""
        return [
            _ITEM_BYTES.get(dtype, 4) * math.prod(map(int, shape.split(",")))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", self.result)
        ]

    def group_size(self, devices: int) -> int:
        """Devices that take part together."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", self.rest):
            return listed[1].count(",") + 1
        if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", self.rest):
            return int(counted[1])
        if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", self.rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
            # An axis, or a part of it: 'axis':(before)size.
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed[2])
            return math.prod(int(part or sizes[name]) for name, part in axes)
        return devices


@dataclasses.dataclass
class Traffic:
    """Collectives that a device takes part in."""

    count: float = 0
    received: float = 0  # bytes that a device receives, at the least

    def add(self, other: "Traffic", times: float = 1) -> None:
        self.count += times * other.count
        self.received += times * other.received


class Program:
    """The computations of a compiled program: name -> instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = None
        found = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        for line in text.splitlines():
            if line[:1].isspace():
                match = _INSTRUCTION.match(line)
                if match and self.computations:
                    self.computations[name].append(Instruction(*match.groups()))
            elif match := _COMPUTATION.match(line):
                name = match[2]
                self.computations[name] = []
                self.entry = name if match[1] else self.entry

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Kind -> (how many, bytes of the largest result on a device), bodies of loops once."""
        counts, largest, seen = collections.Counter(), collections.Counter(), set()
        for name, instructions in self.computations.items():
            for instruction in instructions:
                kind = self._kind(name, instruction)
                if kind is None:
                    continue
                counts[kind] += instruction.part is None or instruction.part not in seen
                seen.add(instruction.part)
                largest[kind] = max(largest[kind], *instruction.sizes, 0)
        return {kind: (counts[kind], largest[kind]) for kind in counts}

    def kernels(self) -> int:
        """Kernels that are not XLA's own: of Pallas, such as splash attention."""
        return sum(
            "tpu_custom_call" in instruction.rest
            for instructions in self.computations.values()
            for instruction in instructions
            if instruction.operation == "custom-call"
        )

    def traffic(self, computation: str | None = None, *, without: Instruction | None = None) -> Traffic:
        """Collectives of a computation (default: of the program), those in loops as often as these run.

        Args:
          computation: its name.
          without: a loop that is left out. Loops of which nobody knows how often they run count once.
        """
        return self._traffic(computation or self.entry, without, set())

    def _traffic(self, name, without, seen) -> Traffic:
        total = Traffic()
        for instruction in self.computations[name]:
            if instruction is without:
                continue
            kind = self._kind(name, instruction)
            if kind is not None and (instruction.part is None or instruction.part not in seen):
                seen.add(instruction.part)
                total.add(Traffic(1, _received(kind, instruction, self.devices, kind != instruction.kind)))
            parts = [self._traffic(called, without, seen) for called in instruction.called]
            if instruction.operation == "conditional":
                parts = [min(parts, key=lambda part: part.received)]
            for part in parts:
                total.add(part, self.trips(instruction) or 1)
        return total

    def trips(self, instruction: Instruction) -> int | None:
        """How often a loop runs; None: it cannot be read off its condition, or it is no loop."""
        condition = re.search(r"condition=%?([\w.-]+)", instruction.rest)
        if instruction.operation != "while" or not condition:
            return None
        lines = self.computations[condition[1]]
        constants = {line.name: line.rest.rstrip(")") for line in lines if line.operation == "constant"}
        last = lines[-1]
        if last.operation != "compare" or "direction=LT" not in last.rest:
            return None
        limit = constants.get(last.rest.partition(")")[0].split(", ")[-1].lstrip("%"), "")
        return int(limit) if limit.isdecimal() else None

    def open_loop(self) -> Instruction | None:
        """The loop that ends nobody knows when; of several the one with most in it."""
        found = []
        for name in self._reached(self.entry):
            loops = (i for i in self.computations[name] if i.operation == "while" and self.trips(i) is None)
            found += [(sum(len(self.computations[n]) for c in i.called for n in self._reached(c)), i) for i in loops]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def of_step(self) -> Traffic:
        """Collectives of one pass through the open loop; nothing where there is none."""
        total, loop = Traffic(), self.open_loop()
        for called in loop.called if loop else ():
            total.add(self.traffic(called))
        return total

    def _reached(self, name) -> list[str]:
        reached, waiting = {}, [name]
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached[name] = None
                waiting += [called for i in self.computations[name] for called in i.called]
        return list(reached)

    @staticmethod
    def _kind(computation: str, instruction: Instruction) -> str | None:
        # On TPUs a reduce-scatter is spelled as a function of its own around an all-reduce.
        if instruction.kind and computation.startswith("all-reduce-scatter"):
            return "reduce-scatter"
        return instruction.kind


def _received(kind: str, instruction: Instruction, devices: int, whole: bool) -> float:
    """Bytes that a device receives at least; `whole`: a reduce-scatter whose result is all of its operand."""
    sizes, others = instruction.sizes, instruction.group_size(devices)
    if instruction.operation in ("all-gather-start", "collective-permute-start"):
        sizes = sizes[len(sizes) // 2 :]  # operands come before results
    size, share = sum(sizes), (others - 1) / others
    factors = {
        "all-gather": share,
        "all-reduce": 2 * share,
        "reduce-scatter": share if whole else others - 1,
        "all-to-all": share,
        "collective-permute": 1,
    }
    return size * factors[kind]
