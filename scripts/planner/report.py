"""What is printed: a table for one mesh, a line a mesh of a search, a row a slice for the documents."""

import dataclasses
import math
import resource

import jax
import jax.numpy as jnp

from planner.arithmetic import Arithmetic, Bound, Workload
from planner.hlo import COLLECTIVES, Traffic
from planner.programs import SAMPLING, Report
from planner.search import Candidate
from planner.topologies import Chip
from r2vpo_jax.models import lora
from r2vpo_jax.training.learner import Learner


def device_bytes(tree, shardings, dtype=None) -> int:
    """Bytes of one device's part."""

    def part(x, where):
        return math.prod(where.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(part, tree, shardings)))


@dataclasses.dataclass
class Plan:
    """The programs of one run on one mesh, compiled.

    Attributes:
      run: the learner.
      count: arithmetic for the same mesh and workload.
      chip: what it is compiled for.
      reports: by program, in the order of an iteration.
    """

    run: Learner
    count: Arithmetic
    chip: Chip
    reports: dict[str, Report]

    def __post_init__(self):
        run = self.run
        config = run.model.config
        self.weights = device_bytes(run.abstract_params, run.param_shardings)
        self.sampled = device_bytes(run.abstract_params, run.param_shardings, config.compute_dtype)
        # Frozen weights that have the compute dtype are the sampler's too.
        frozen = device_bytes(*(lora.split(tree)[1] for tree in (run.abstract_params, run.param_shardings)))
        self.shared = frozen if config.weights_dtype == config.compute_dtype else 0
        self.optimizer = device_bytes(run.abstract_state.opt_state, run.state_shardings.opt_state)

    def parameters(self, name: str) -> int:
        """Bytes of those that a program reads."""
        return {"segment": self.sampled, "sampler": self.sampled, "regroup": 0}.get(name, self.weights)

    def moments(self, name: str) -> int:
        return self.optimizer if name == "update" else 0

    def beside(self, name: str) -> int:
        """Bytes of what the program does not read and stays on the device all the same."""
        learner = self.weights + self.optimizer - self.shared
        return {"scoring": self.optimizer, "update": 0, "regroup": learner + self.sampled}.get(name, learner)

    def total(self, name: str) -> int:
        report = self.reports[name]
        return report.arguments + report.temporaries + report.rest + self.beside(name)

    def fits(self, name: str) -> bool:
        return self.reports[name].error is None and self.total(name) <= self.chip.memory * 2**30

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the mesh."""
        return tuple(self.run.mesh.shape.values())

    @property
    def all_fit(self) -> bool:
        return all(self.fits(name) for name in self.reports)

    @property
    def sampling_fits(self) -> bool:
        return all(self.fits(name) for name in self.reports if name in SAMPLING)

    def peaks(self) -> tuple[int, int]:
        """Bytes a device of the largest program of rollouts, and of learning."""
        sampling = max(self.total(name) for name in self.reports if name in SAMPLING)
        return sampling, max(self.total(name) for name in self.reports if name not in SAMPLING)

    def of_step(self) -> Traffic:
        """Of the last segment: a token of each row."""
        return self.reports["segment"].step

    def step(self) -> Bound:
        return self.count.decode_step(self.chip, self.of_step().received)

    def scoring(self) -> Bound:
        known = self.reports.get("scoring")
        return self.count.scoring(self.chip, known.traffic.received if known else 0)

    def update(self) -> Bound:
        return self.count.update(self.chip, self.reports["update"].traffic.received)

    def seconds(self) -> float:
        """Of an iteration, at least."""
        parts = self.step().serial, self.scoring().overlapped, self.update().overlapped
        return self.count.iteration(self.chip, *parts)


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def print_plan(plan: Plan, chip_name: str) -> None:
    """The table for one mesh: a column a program."""
    reports, work, chip = plan.reports, plan.count.workload, plan.chip

    def show(label, cell):
        cells = [cell(name, report) if report.error is None else "-" for name, report in reports.items()]
        print(f"  {label:46s}" + "".join(f"{text:>15s}" for text in cells))

    def batch(name, report):
        return mib(report.arguments - plan.parameters(name) - plan.moments(name))

    caches = plan.count.cache_bytes(work.columns[-1])
    print(f"\n{'':48s}" + "".join(f"{name:>15s}" for name in reports) + "\nMiB a device")
    show("parameters", lambda name, _: mib(plan.parameters(name)))
    show("optimizer state", lambda name, _: mib(plan.moments(name)))
    show("batch, and padding of the arguments", batch)
    show("temporaries: activations, gradients, …", lambda _, r: mib(r.temporaries))
    show("  of which KV cache, from its shape: at most", lambda name, _: mib(caches if name == "sampler" else 0))
    show("outputs, program", lambda _, r: mib(r.rest))
    show("what stays beside it: learner, sampler's copy", lambda name, _: mib(plan.beside(name)))
    show("total", lambda name, _: mib(plan.total(name)))
    show(f"of {chip.memory * 1024:,.0f} on {chip_name}", lambda name, _: "fits" if plan.fits(name) else "DOES NOT FIT")
    flops = plan.count.flops()
    print("TFLOP a device")
    show("matrix products, from shapes", lambda name, _: f"{flops[name] / 1e12:,.2f}" if name in flops else "-")
    show(
        "compiler's count (loops once; not with kernels)",
        lambda _, r: "-" if r.flops is None else f"{r.flops / 1e12:,.2f}",
    )
    show("kernels (Pallas)", lambda _, r: str(r.kernels))
    print("collectives: how many (largest result, MiB); body of a loop once")
    for kind in COLLECTIVES:
        found = {name: r.collectives.get(kind, (0, 0)) for name, r in reports.items()}
        show(kind, lambda name, _, found=found: f"{found[name][0]} ({mib(found[name][1])})")
    print("collectives as often as they run")
    show("in the loop over tokens: how many a token", lambda _, r: f"{r.step.count:,.0f}")
    show("  KiB that a device receives a token", lambda _, r: f"{r.step.received / 2**10:,.1f}")
    show("elsewhere: how many", lambda _, r: f"{r.traffic.count:,.0f}")
    show("  MiB that a device receives", lambda _, r: mib(r.traffic.received))
    print_bounds(plan)
    print("compilation")
    show("seconds", lambda _, r: f"{r.seconds:.0f}")
    print(f"  peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    for name in (name for name in reports if not plan.fits(name)):
        print(f"{name} does not fit: {reports[name].error or mib(plan.total(name)) + ' MiB a device'}")


def print_bounds(plan: Plan) -> None:
    """Least times, where all that they depend on has been compiled."""
    if any(report.error for report in plan.reports.values()):
        return
    print(f"at least, of milliseconds:   {'products':>12s}{'memory':>12s}{'links':>12s}{'in all':>12s}")
    bounds = {
        "a decode step, all rows": (plan.step(), plan.step().serial),
        "scoring": (plan.scoring(), plan.scoring().overlapped),
        "an update": (plan.update(), plan.update().overlapped),
    }
    for label, (bound, total) in bounds.items():
        cells = (bound.products, bound.memory, bound.links, total)
        print(f"  {label:26s} " + "".join(f"{1e3 * cell:12,.2f}" for cell in cells))
    print(f"  an iteration in which all responses are as long as may be: {plan.seconds():,.1f} s")


def print_search(candidates: list[Candidate], plans: list[Plan]) -> None:
    """A line a mesh: those compiled, the fastest first; those left out; those ruled out, and why."""
    print("data,fsdp,tensor  prompts at a time  GiB: sampling  update   step, ms   update, s   iteration, s")
    done = {plan.sizes for plan in plans}

    def line(mesh, text):
        print(f"{','.join(map(str, mesh)):16s}  {text}", flush=True)

    for plan in plans:
        at_once = f"{plan.count.workload.prompts_at_a_time:17d}"
        broken = [report.error for report in plan.reports.values() if report.error]
        if broken:
            line(plan.sizes, f"{at_once}  does not fit: {broken[0][:150]}")
            continue
        sampling, update = (f"{size / 2**30:.1f}" for size in plan.peaks())
        times = plan.step().serial * 1e3, plan.update().overlapped, plan.seconds()
        text = f"{at_once}  {sampling:>13s}  {update:>6s}  {times[0]:9.2f}   {times[1]:9.2f}   {times[2]:12.1f}"
        line(plan.sizes, text + ("" if plan.all_fit else "  DOES NOT FIT"))
    for candidate in candidates:
        if candidate.mesh not in done:
            line(candidate.mesh, candidate.reason or f"not compiled; iteration by arithmetic {candidate.seconds:.1f} s")


ROW_TITLES = """\
| model | slice | tokens | data, fsdp, tensor | prompts at a time | GiB: sampling | GiB: update | TFLOP of an update | step, ms | collectives a token | update, s | iteration, s |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def _why(candidates: list[Candidate], plans: list[Plan]) -> str:
    """What the most promising mesh that was compiled lacks; where none was, the mesh that lacks least by arithmetic."""
    if plans:
        plan, mesh = plans[0], ", ".join(map(str, plans[0].sizes))
        wanted = {name: plan.reports[name].error or f"{plan.total(name) / 2**30:.1f} GiB" for name in plan.reports}
        return f"{mesh}: " + ", ".join(f"{name} {text[:100]}" for name, text in wanted.items() if not plan.fits(name))
    short = [candidate for candidate in candidates if candidate.memory]
    return min(short, key=lambda candidate: candidate.memory).reason if short else "no mesh divides it"


def row(model: str, topology: str, work: Workload, candidates: list[Candidate], plans: list[Plan]) -> tuple[str, bool]:
    """A row for the documents, and whether something fits."""
    cells = [model, topology, f"{work.prompt_length:,} + {work.response_length:,}"]
    if not plans or not plans[0].all_fit:
        return f"| {' | '.join(cells)} | does not fit: {_why(candidates, plans)} |" + " |" * 8, False
    plan = plans[0]
    sampling, update = plan.peaks()
    step = plan.of_step()
    cells += [
        ", ".join(map(str, plan.sizes)),
        str(plan.count.workload.prompts_at_a_time),
        f"{sampling / 2**30:.1f}",
        f"{update / 2**30:.1f}",
        f"{plan.count.flops()['update'] / 1e12:,.0f}",
        f"{plan.step().serial * 1e3:.1f}",
        f"{step.count:.0f}, {step.received / 2**10:,.0f} KiB",
        f"{plan.update().overlapped:.2f}",
        f"{plan.seconds():,.0f}",
    ]
    return f"| {' | '.join(cells)} |", True
