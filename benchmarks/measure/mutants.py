"""Tests of the tests: how many random changes to kernels/ and torch_sigmoid/ make a test fail.

cosmic-ray finds the points and makes the changes: another operator or comparison, a negated condition, a number off by one, a
missing decorator, a loop without iterations. It leaves strings alone. This file leaves out annotations, arithmetic turned into
operations on bits (floats refuse those, so any test would notice) and what Python refuses to compile. Whether a point is in the
sample depends on the seed, its function and its line alone, so that an edit elsewhere does not change the sample.

Each mutant runs in a copy of the checkout, below runs/. It faces the tests that concern its file until one fails or takes too
long. That kills the mutant, if the same test passes on the unchanged copy. A test that fails on the unchanged copy is left
out, and mutants.json names it under "red".

Writes each result to benchmarks/results/mutants.csv at once; the next run with the same seed continues there. If nothing can
tell a survivor from the original, write the reason into its column `equivalent`: later runs keep it, and draw another mutant
in its place. Takes hours.
"""

import contextlib
import csv
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from . import record

WORK = record.ROOT / "runs" / "mutants"
# The tests that concern a file, likely killers first: what executes the kernels (tests/conftest.py), then names of test files.
CONCERNED = {
    "kernels/__init__.py": ("device package", "interpreter strides"),
    "kernels/gates.py": ("ptx gates", "device codegen"),
    "kernels/interleaved.py": ("ptx gates", "device gates codegen"),
    "kernels/kept.py": ("device launch",),
    "kernels/pointwise.py": ("ptx layouts strides", "device codegen launch"),
    "kernels/reduce.py": ("ptx gates losses", "device codegen"),
    "kernels/tiles.py": ("ptx layouts strides", "device codegen"),
    "kernels/launch.py": (
        "device launch layouts",
        "ptx forward layouts strides",
        "device codegen",
        "interpreter strides autograd",
    ),
    "kernels/losses.py": ("ptx losses", "device codegen"),
    "kernels/maths.py": (
        "ptx losses gates forward backward",
        "device maths formulas codegen",
        "ptx siglip",
        "interpreter forward strides",
    ),
    "kernels/siglip.py": ("ptx siglip", "device codegen"),
    "kernels/sigmoid.py": ("ptx forward backward layouts", "device codegen launch", "interpreter autograd"),
    "kernels/statistics.py": ("ptx watch_statistics",),
    "torch_sigmoid/__init__.py": ("device package modules",),
    "torch_sigmoid/__main__.py": ("device doctor",),
    "torch_sigmoid/agreement.py": ("device doctor operators",),
    "torch_sigmoid/autograd.py": (
        "device operators autograd modules backward tracing graphs",
        "ptx operators backward",
        "interpreter autograd",
    ),
    "torch_sigmoid/checks.py": ("device operators errors losses gates siglip tensors", "ptx losses"),
    "torch_sigmoid/diagnostics/__init__.py": ("device package",),
    "torch_sigmoid/diagnostics/advice.py": ("device watch_report",),
    "torch_sigmoid/diagnostics/gradients.py": ("device watch watch_steps",),
    "torch_sigmoid/diagnostics/layers.py": ("device watch watch_statistics watch_gates", "ptx watch_statistics"),
    "torch_sigmoid/diagnostics/report.py": ("device watch_report",),
    "torch_sigmoid/diagnostics/statistics.py": ("device watch_statistics", "ptx watch_statistics"),
    "torch_sigmoid/diagnostics/totals.py": ("device watch_steps watch_statistics", "ptx watch_statistics"),
    "torch_sigmoid/diagnostics/watch.py": ("device watch watch_steps watch_report",),
    "torch_sigmoid/doctor.py": ("device doctor",),
    "torch_sigmoid/eager.py": ("device eager extremes formulas gates losses operators",),
    "torch_sigmoid/formulas.py": ("device formulas operators gates losses tracing autograd", "interpreter autograd"),
    "torch_sigmoid/functional.py": ("device package",),
    "torch_sigmoid/gates.py": ("device operators gates graphs", "ptx operators gates"),
    "torch_sigmoid/layers.py": ("device hub",),
    "torch_sigmoid/library.py": ("device library dtensor",),
    "torch_sigmoid/losses.py": ("device operators losses", "ptx operators losses"),
    "torch_sigmoid/internals.py": ("device internals tracing autograd tensors watch replace",),
    "torch_sigmoid/nn.py": ("device operators modules errors gates losses siglip", "ptx operators"),
    "torch_sigmoid/dispatch.py": (
        "device backward launch tensors tracing",
        "ptx backward",
        "interpreter modules tensors autograd",
    ),
    "torch_sigmoid/operators.py": ("device operators modules package launch watch_statistics", "ptx operators launch"),
    "torch_sigmoid/ring.py": ("device siglip_ranks",),
    "torch_sigmoid/shards.py": ("device dtensor",),
    "torch_sigmoid/siglip.py": ("device operators siglip siglip_ranks", "ptx operators siglip"),
    "torch_sigmoid/siglip_dtensor.py": ("device siglip_ranks",),
    "torch_sigmoid/siglip_library.py": ("device siglip",),
    "torch_sigmoid/sigmoid.py": ("device tensors errors tracing backward", "interpreter tensors autograd"),
    "torch_sigmoid/swap/__init__.py": ("device package",),
    "torch_sigmoid/swap/blocks.py": ("device replace forms",),
    "torch_sigmoid/swap/criteria.py": ("device forms",),
    "torch_sigmoid/swap/focal.py": ("device intercept",),
    "torch_sigmoid/swap/forms/__init__.py": ("device forms",),
    "torch_sigmoid/swap/forms/by_hand.py": ("device forms",),
    "torch_sigmoid/swap/forms/diffusers.py": ("device forms",),
    "torch_sigmoid/swap/forms/open_clip.py": ("device forms",),
    "torch_sigmoid/swap/forms/timm.py": ("device forms",),
    "torch_sigmoid/swap/forms/torchvision.py": ("device forms",),
    "torch_sigmoid/swap/forms/transformers.py": ("device forms",),
    "torch_sigmoid/swap/functions.py": ("device trees replace",),
    "torch_sigmoid/swap/gates.py": ("device replace forms watch_gates",),
    "torch_sigmoid/swap/intercept.py": ("device intercept operators modules tracing",),
    "torch_sigmoid/swap/libraries.py": ("device doctor",),
    "torch_sigmoid/swap/places.py": ("device intercept",),
    "torch_sigmoid/swap/transformers_hook.py": ("device register_transformers",),
    "torch_sigmoid/swap/replacement.py": ("device replace forms modules tracing", "ptx modules"),
    "torch_sigmoid/swap/reporting.py": ("device replace",),
    "torch_sigmoid/swap/trees.py": ("device trees forms",),
}
# Shifts and bitwise operations, which floats do not have.
SENSELESS = re.compile(r"core/ReplaceBinaryOperator_(Add|Sub|Mul|Div|FloorDiv|Mod|Pow)_(RShift|LShift|Bit\w+)")
# Limits for one run of pytest, several times what the longest takes: CPU time, and wall time on a machine with other work.
CPU_SECONDS, WALL_SECONDS = 900, 7200


class Mutant(NamedTuple):
    id: str
    file: str
    line: int
    definition: str
    operator: str
    change: str
    code: str


def sources() -> list[str]:
    folders = (record.ROOT / name for name in ("kernels", "torch_sigmoid"))
    return sorted(path.relative_to(record.ROOT).as_posix() for folder in folders for path in folder.rglob("*.py"))


def rank(*words) -> str:
    return hashlib.sha256(" | ".join(map(str, words)).encode()).hexdigest()


def annotates(node) -> bool:
    """Whether a node of parso's tree is part of an annotation."""
    while node.parent is not None:
        before = node.get_previous_sibling()
        if before == "->" or (before == ":" and node.parent.type in ("tfpdef", "annassign")):
            return True
        node = node.parent
    return False


def points(file: str) -> Iterator[tuple[tuple, int, list[tuple[str, int]]]]:
    """The points that cosmic-ray would change in a file: a name that survives edits elsewhere, the line, and the changes."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery
    from cosmic_ray.plugins import get_operator, operator_names

    source = (record.ROOT / file).read_text()
    nodes = list(ast_nodes(get_ast(source)))
    node_at, changes = {}, defaultdict(list)
    for name in operator_names():
        # Operators with arguments replace variables, whose names they would have to be given.
        if SENSELESS.match(name) or get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        positions = ((position, node) for node in nodes for position in operator.mutation_positions(node))
        for occurrence, (position, node) in enumerate(positions):
            node_at[position] = node
            changes[position].append((name, occurrence))
    alike = Counter()
    for position in sorted(changes):
        (line, _), node = position[0], node_at[position]
        place = file, ASTQuery(node).get_definition_name() or "", source.split("\n")[line - 1].strip()
        alike[place] += 1
        if not annotates(node):
            yield (*place, alike[place]), line, changes[position]


def compiles(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(code, "mutant", "exec")
    except (SyntaxError, SyntaxWarning):
        return False
    return True


def change_of(before: str, after: str) -> str:
    """The lines that differ, joined into one."""
    old, new = before.split("\n"), after.split("\n")
    for end in (0, -1):
        while old and new and old[end] == new[end]:
            del old[end], new[end]
    return " → ".join(" ".join(" ".join(lines).split()) or "(nothing)" for lines in (old, new))


def sample(seed: int, count: int, equivalent: Iterable[str] = ()) -> list[Mutant]:
    """Draw mutants at random points of the checkout until `count` of them are not `equivalent`."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    drawn = []
    for _, place, line, changes in sorted(
        (rank(seed, *place), place, *rest) for file in sources() for place, *rest in points(file)
    ):
        source = (record.ROOT / place[0]).read_text()
        for index in sorted(range(len(changes)), key=lambda index: rank(seed, *place, index)):
            operator, occurrence = changes[index]
            code = mutate_code(source, get_operator(operator)(), occurrence)
            change = change_of(source, code)
            if code != source and compiles(code):
                name = rank(*place, operator, change)[:8]
                drawn.append(Mutant(name, place[0], line, place[1], operator.removeprefix("core/"), change, code))
                break
        if sum(mutant.id not in equivalent for mutant in drawn) == count:
            break
    return drawn


def copy_checkout(to: Path) -> None:
    """Copy the files that git would commit."""
    shutil.rmtree(to, ignore_errors=True)
    for name in record.output_of(["git", "ls-files", "--cached", "--others", "--exclude-standard"]).splitlines():
        if (record.ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(record.ROOT / name, to / name)


def expendable() -> None:
    """Limit a mutant's process, and let all others go first, for time and for memory."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 10))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class Judge:
    """Runs mutants against the tests in a copy of the checkout, and believes a test only if it passes without the mutation.

    Attributes:
        folder: holds the copy.
        red: tests that fail without any mutation and are left out: how kernels run, and the test.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.copy = folder / "checkout"
        self.red: list[tuple[str, str]] = []
        self.passes_unchanged: set[tuple] = set()
        self.n_written = 0
        copy_checkout(self.copy)

    def judge(self, mutant: Mutant) -> dict:
        """Run the tests that concern a mutant, and give its row."""
        row = {key: value for key, value in mutant._asdict().items() if key != "code"} | {"outcome": "survived"}
        row |= {"killed by": "", "seconds": None, "equivalent": ""}
        begin = time.monotonic()
        for stage in CONCERNED[mutant.file]:
            way, *names = stage.split()
            tests = [f"tests/test_{name}.py" for name in names]
            outcome, test = self.face(mutant, way, tests)
            if outcome != "passed":
                killer = f"--kernels={way} {test or ' '.join(tests)}"
                row |= {"outcome": "killed" if outcome == "failed" else outcome, "killed by": killer}
                break
        return row | {"seconds": round(time.monotonic() - begin)}

    def face(self, mutant: Mutant, way: str, tests: list[str]) -> tuple[str, str]:
        """As `run_tests`, on a mutant."""
        while True:
            with self.written(mutant):
                outcome, test = self.run_tests(way, tests, [test for its_way, test in self.red if its_way == way])
            killers = way, *([test] if test else tests)
            if outcome == "passed" or killers in self.passes_unchanged:
                return outcome, test
            unchanged, _ = self.run_tests(way, list(killers[1:]))
            if unchanged == "passed":
                self.passes_unchanged.add(killers)
            elif test:
                print(f"fails without any mutation, and takes no part: --kernels={way} {test}", file=sys.stderr)
                self.red.append((way, test))
            else:
                raise record.WrongResultError(f"without any mutation: {unchanged}, --kernels={way} {' '.join(tests)}")

    def run_tests(self, way: str, tests: list[str], left_out: Iterable[str] = ()) -> tuple[str, str]:
        """The outcome of pytest on the copy, "passed", "failed" or "timeout", and the first test that failed, if any."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--tb=no",
            "-rfE",
            "-p",
            "no:cacheprovider",
            "--hypothesis-seed=0",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(WORK / "triton")}
        environment.pop("TRITON_INTERPRET", None)
        with open(self.folder / "output.txt", "w+") as output:
            options = {"cwd": self.copy, "env": environment, "stdout": output, "stderr": output, "start_new_session": True}
            arguments = [f"--kernels={way}", *tests, *(f"--deselect={test}" for test in left_out)]
            process = subprocess.Popen([*command, *arguments], preexec_fn=expendable, **options)
            try:
                process.wait(WALL_SECONDS)
            except subprocess.TimeoutExpired:
                return "timeout", ""
            finally:
                # End the processes that tests have started, too.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", output.read(), re.MULTILINE)
        outcome = {0: "passed", -signal.SIGXCPU: "timeout"}.get(process.returncode, "failed")
        return outcome, failed.group(1) if failed else ""

    @contextlib.contextmanager
    def written(self, mutant: Mutant):
        path, original = self.copy / mutant.file, self.folder / "original.py"
        shutil.copy2(path, original)
        path.write_text(mutant.code)
        # Python reuses compiled code if the file's time and size are the same, so each mutant gets a time of its own.
        self.n_written += 1
        os.utime(path, (self.n_written, self.n_written))
        try:
            yield
        finally:
            shutil.copy2(original, path)


def read_rows(path: Path) -> dict[str, dict]:
    """The results so far, by the mutant's id."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {row["id"]: row | {"seconds": int(row["seconds"])} for row in csv.DictReader(file)}


def main(argv=None) -> int:
    parser = record.parser("mutants", __doc__, device=False)
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--count", type=int, default=100, help="mutants in the sample (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="run the survivors again, except for the equivalent ones")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once, a core each (default: %(default)s)")
    arguments = parser.parse_args(argv)
    path = arguments.out / "mutants.csv"
    known = read_rows(path)
    mutants = sample(arguments.seed, arguments.count, {name for name, row in known.items() if row["equivalent"]})
    if arguments.again:
        known = {name: row for name, row in known.items() if row["outcome"] != "survived" or row["equivalent"]}
    arguments.out.mkdir(parents=True, exist_ok=True)
    judges = [Judge(WORK / str(number)) for number in range(arguments.jobs)]
    idle, writing = list(judges), threading.Lock()

    def run(mutant):
        judge = idle.pop()
        try:
            row = known[mutant.id] = judge.judge(mutant)
        finally:
            idle.append(judge)
        with writing, open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    waiting = [mutant for mutant in mutants if mutant.id not in known]
    with ThreadPoolExecutor(arguments.jobs) as workers:
        for future in record.progress([workers.submit(run, mutant) for mutant in waiting], "mutants"):
            future.result()
    rows = [known[mutant.id] | {"line": mutant.line} for mutant in mutants]
    survivors = [row for row in rows if row["outcome"] == "survived"]
    left_out = [f"--kernels={way} {test}" for judge in judges for way, test in judge.red]
    counts = {"killed": len(rows) - len(survivors), "equivalent": sum(bool(row["equivalent"]) for row in survivors)}
    record.write(
        arguments.out, "mutants", rows, record.environment(torch.device("cpu")), seed=arguments.seed, **counts, red=left_out
    )
    record.show("Survivors", survivors, ["id", "file", "line", "change", "equivalent"])
    total = len(rows) - counts["equivalent"]
    print(f"{counts['killed']} of {total} mutants killed; {counts['equivalent']} more are equivalent to the original")
    return 0


if __name__ == "__main__":
    sys.exit(main())
