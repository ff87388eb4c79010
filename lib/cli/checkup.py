"""The checks of `kumiki doctor`: each gives one row, none of them raises.

Rule:  a capability is tried, not read from a flag: an allocation and a matmul, a kernel launched
       and compared with its reference, the folder that scratch will lie in.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lib.cli import estimate
from lib.cli.cost import KNOBS, problems, totals
from lib.cli.machines import Machine, this_machine
from lib.core import artifact, files
from lib.core.errors import KumikiError
from lib.core.settings import Settings
from lib.export import amounts

State = Literal["ok", "warn", "fail", "skip"]
LEAST_PYTHON = (3, 11)
LEAST_FILES = 1024
VARIABLES = (
    "KUMIKI_SCRATCH", "KUMIKI_LAUNCHER", "KUMIKI_NPROC", "KUMIKI_RDZV", "KUMIKI_NNODES",
    "KUMIKI_SBATCH", "KUMIKI_CODE_CHANGE", "KUMIKI_DEBUG", "CUDA_VISIBLE_DEVICES", "HF_TOKEN",
    "HF_HOME", "HF_DATASETS_CACHE", "TIKTOKEN_CACHE_DIR", "WANDB_MODE", "WANDB_API_KEY",
    "TRITON_INTERPRET", "NO_COLOR",
)  # fmt: skip
SECRET = ("HF_TOKEN", "WANDB_API_KEY")


@dataclass(frozen=True)
class Row:
    """One capability."""

    name: str
    state: State
    found: str
    needed: str = ""
    remedy: str = ""

    def plain(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def all_rows(settings: Settings, family: str | None) -> Iterator[Row]:
    """Everything but kernels and rates."""
    yield from packages()
    yield from torch_rows()
    yield from triton_rows(settings, family)
    machine, needs = this_machine(), Needs()
    try:
        needs = needs_of(settings, family, machine)
    except KumikiError as error:
        yield Row("estimate", "fail", str(error), "", "see kumiki estimate")
    yield from machine_rows(machine, needs)
    yield from scratch_rows(needs)
    yield from tool_rows()
    yield from variable_rows()


# ---------------------------------------------------------------- software


def packages() -> Iterator[Row]:
    """Python, and every package of constraints.txt that is installed, against its pin."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= LEAST_PYTHON
    yield Row("python", "ok" if good else "fail", version, ">= 3.11", "install Python 3.11")
    path = Path("constraints.txt")
    pins = re.findall(r"^([\w.\-]+)==(\S+)", path.read_text(), re.M) if path.is_file() else []
    other = []
    for name, pin in pins:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not wanted here
        if found.split("+")[0] != pin:
            other.append(f"{name} {found} instead of {pin}")
    told = "; ".join(other) if other else f"{len(pins)} pins hold"
    remedy = "pip install -c constraints.txt -e ."
    yield Row("packages", "warn" if other else "ok", told, "constraints.txt", remedy)


def torch_rows() -> Iterator[Row]:
    """An allocation and a matmul on every device that torch sees."""
    import torch

    yield Row("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    x = torch.ones(8, 8)
    yield Row("torch on CPU", "ok" if bool((x @ x == 8).all()) else "fail", "matmul", "right")
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        found = "no device answers" if built else "this build has no CUDA"
        yield Row("GPU", "warn" if built else "skip", found, "", "install a matching driver")
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu_row(index)


def _gpu_row(index: int) -> Row:
    import torch

    try:
        made = torch.ones(8, 8, device=f"cuda:{index}")
        right = bool((made @ made == 8).all())
    except RuntimeError as error:
        return Row(f"GPU {index}", "fail", str(error).splitlines()[0], "", "check the driver")
    about = torch.cuda.get_device_properties(index)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found = f"{about.name}, {amounts.size(about.total_memory)}, sm_{about.major}{about.minor}"
    found += ", bf16" if bf16 else ", fp16"
    return Row(f"GPU {index}", "ok" if right else "fail", found, "a right matmul")


def triton_rows(settings: Settings, family: str | None) -> Iterator[Row]:
    """Whether triton is there, at torch's pin, and whether the profile insists on it."""
    wanted = getattr(settings.runtime, "kernels", "auto") == "triton"
    needed = "runtime.kernels: triton" if wanted else "nothing"
    remedy = "pip install -e '.[triton]', or runtime.kernels: reference"
    if importlib.util.find_spec("triton") is None:
        state: State = "fail" if wanted else "skip"
        yield Row("triton", state, "not installed", needed, remedy)
        return
    version, pin = metadata.version("triton"), _pin("triton")
    mode = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "device"
    state = "ok" if pin in (None, version) else "warn"
    yield Row("triton", state, f"{version}, {mode}", f"torch's pin {pin or version}", remedy)


def _pin(name: str) -> str | None:
    """The version that torch's own metadata or constraints.txt asks for."""
    path = Path("constraints.txt")
    found = re.search(rf"^{name}==(\S+)", path.read_text(), re.M) if path.is_file() else None
    return found[1] if found else None


# ---------------------------------------------------------------- kernels


def kernel_rows(settings: Settings) -> Iterator[Row]:
    """Every operator launched forward and backward on odd shapes against its reference."""
    import torch

    from lib import kernels
    from lib.train.precision import pick_device

    report = getattr(kernels, "report", None)
    if report is None:
        yield Row("kernels", "ok", "reference on CPU")
        return
    device = pick_device(settings.runtime.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = getattr(settings.runtime, "kernels", "auto") == "triton"
    left_out = []
    for decision in report(device, dtype):
        broken = decision.error is not None and not decision.error <= 1
        bound = "" if decision.tolerance is None else f"relative RMS < {decision.tolerance:.1e}"
        if decision.kernel:
            found = f"kernel, error {decision.error or 0:.2f} of the bound"
            yield Row(f"kernel {decision.operator}", "ok", found, bound)
        elif broken or wanted or decision.reason.startswith("self-test"):
            found = decision.reason
            remedy = f"runtime.kernels: {{{decision.operator}: reference}}"
            yield Row(f"kernel {decision.operator}", "fail", found, bound, remedy)
        else:
            left_out.append(decision)
    if left_out:
        reasons = "; ".join(dict.fromkeys(d.reason for d in left_out))
        found = f"reference on {device.type.upper()} for {len(left_out)} operators ({reasons})"
        yield Row("kernels", "ok", found)


# ---------------------------------------------------------------- machine


@dataclass(frozen=True)
class Needs:
    """Bytes that the estimate asks for, and the kinds of which this machine has too few."""

    ram: float | None = None
    vram: float | None = None
    scratch: float | None = None
    lacking: frozenset[str] = frozenset()

    def judge(self, kind: str) -> State:
        """Whether there is enough of a kind, in the words of `cost.problems`."""
        return "fail" if kind in self.lacking else "ok"


def needs_of(settings: Settings, family: str | None, machine: Machine) -> Needs:
    """Of the profile, or of one family's training: what `kumiki estimate` says and refuses by."""
    if family is not None and family not in settings.train:
        return Needs()
    found = estimate.costs(settings, machine, family)
    sums = totals(found)
    return Needs(
        ram=sums["ram_bytes"] or None,
        vram=sums["vram_bytes"] or None,
        scratch=sums["scratch_bytes"] or None,
        lacking=frozenset(kind for kind, *_ in problems(found, machine)),
    )


def machine_rows(machine: Machine, needs: Needs) -> Iterator[Row]:
    """RAM, memory of the GPU, memory that may be pinned, file limit."""
    state: State = "skip" if machine.ram_bytes is None else needs.judge("memory")
    remedy = KNOBS["memory"]
    yield Row("RAM", state, amounts.size(machine.ram_bytes), _asked(needs.ram), remedy)
    if machine.vram_bytes is not None:
        state, found = needs.judge("GPU memory"), amounts.size(machine.vram_bytes)
        yield Row("VRAM", state, found, _asked(needs.vram), remedy)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    yield Row("pinnable memory", "ok", "unlimited" if unlimited else amounts.size(locked), "",
              "ulimit -l, for streamed weights")  # fmt: skip
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    state = "ok" if limit >= LEAST_FILES else "warn"
    yield Row("open files", state, f"{limit:,}", f"{LEAST_FILES:,}", "ulimit -n 4096")


def _asked(size: float | None) -> str:
    return "" if size is None else amounts.size(size)


def scratch_rows(needs: Needs) -> Iterator[Row]:
    """The scratch folder: rights, space, file system, mount; and how DVC links its cache."""
    place = artifact.scratch_root()
    base = place
    while not base.exists():
        base = base.parent if base.parent != base else Path()
    free, kind, mount = files.free_bytes(place), *file_system(base)
    good = os.access(base, os.W_OK)
    remedy = "set KUMIKI_SCRATCH to a folder on a large disk that you may write to"
    found = f"{amounts.size(free)} free, {kind or 'unknown file system'} at {mount}"
    state: State = "fail" if not good or kind in ("tmpfs", "ramfs") else "ok"
    yield Row("scratch", state, found, "writable, on a disk", remedy)
    space = "skip" if needs.scratch is None else needs.judge("disk")
    yield Row("scratch space", space, f"{amounts.size(free)} free", _asked(needs.scratch),
              KNOBS["disk"])  # fmt: skip
    wanted = os.environ.get("KUMIKI_SCRATCH", "")
    if wanted.startswith(("/mnt/", "/media/")) and mount == "/":
        yield Row("scratch mount", "fail", "on the system's disk", "its own disk", "mount it")
    own = Path(".dvc/config.local")
    link = re.search(r"type = (\S+)", own.read_text()) if own.is_file() else None
    if kind in ("xfs", "btrfs"):
        yield Row("DVC links", "ok", "reflink", "reflink")
    else:
        state = "ok" if link else "warn"
        yield Row("DVC links", state, link[1] if link else "copies", "hardlink for large outputs",
                  "make setup-disk")  # fmt: skip


def file_system(path: Path) -> tuple[str | None, str]:
    """(type, mount point) of the file system that holds `path`; from /proc/mounts."""
    place, best = str(path.resolve()), ("/", None)
    if Path("/proc/mounts").is_file():
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, kind, *_ = line.split()
            point = point.replace("\\040", " ")
            inside = place == point or place.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best[0]):
                best = (point, kind)
    return best[1], best[0]


def tool_rows() -> Iterator[Row]:
    """git, make, the fast gzip reader."""
    for name in ("git", "make"):
        found = shutil.which(name)
        state: State = "ok" if found else "fail"
        yield Row(name, state, "present" if found else "absent", "needed", f"install {name}")
    fast = importlib.util.find_spec("isal") is not None
    yield Row("igzip", "ok" if fast else "warn", "present" if fast else "absent, slower gzip",
              "", "pip install isal")  # fmt: skip


def variable_rows() -> Iterator[Row]:
    """Which environment variables of ours are set; secrets as yes or no."""
    told = [
        f"{name} {'is set' if name in SECRET else os.environ[name]}"
        for name in VARIABLES
        if os.environ.get(name)
    ]
    login = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "token"
    told += ["hub login present"] if login.is_file() else []
    yield Row("environment", "ok", "; ".join(told) or "nothing set")


def online_row() -> Row:
    """Whether the hub answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info("openai-community/gpt2", timeout=10)
    except (HfHubHTTPError, OSError, ValueError) as error:
        return Row(
            "hub", "fail", type(error).__name__, "an answer", "check network and HF_ENDPOINT"
        )
    return Row("hub", "ok", "answers")


# ---------------------------------------------------------------- rates


def measure_rates() -> dict[str, float]:
    """Disk, matmul and AdamW of this machine: what estimates use from then on."""
    import torch

    from lib.train.precision import compute_dtype, pick_device

    device = pick_device("auto")
    dtype = compute_dtype("auto", device)
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)

    def matmul() -> None:
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()

    weights = torch.nn.Parameter(torch.zeros(16 * 2**20))
    weights.grad = torch.ones_like(weights)
    adamw = torch.optim.AdamW([weights], fused=True)
    rates = {
        "matmul_flops": 2 * n**3 / _best(matmul),
        "adamw_parameters_per_s": weights.numel() / _best(adamw.step),
        "disk_bytes_per_s": _disk_rate(64 * 2**20),
    }
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=device)

        def copy(target: Any, source: Any) -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        rates["h2d_bytes_per_s"] = host.numel() / _best(lambda: copy(there, host))
        rates["d2h_bytes_per_s"] = host.numel() / _best(lambda: copy(host, there))
    return rates


def _best(call: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _disk_rate(total_bytes: int) -> float:
    """Bytes/s written to scratch, down to the disk."""
    place = artifact.scratch_root() / ".rate.part"
    data = os.urandom(2**20)
    start = time.perf_counter()
    try:
        with files.atomic_file(place) as out:
            for _ in range(total_bytes // len(data)):
                out.write(data)
        return total_bytes / (time.perf_counter() - start)
    finally:
        place.unlink(missing_ok=True)


def family_rows(settings: Settings, run: str) -> Iterator[Row]:
    """The deep checks of a run's family at the profile's own sizes (selfcheck.py); never raises."""
    import torch

    from lib.cli.selfcheck import verify
    from lib.models.base import load_family
    from lib.train.precision import pick_device

    section = settings.train.get(run)
    if section is None:
        yield Row(f"model {run}", "skip", "no run of this name in params.yaml")
        return
    encoding = settings.encode_tokens[section.tokens or "bpe"]
    vocab_size = settings.train_tokenizer[encoding.tokenizer].vocab_size
    family = section.family or run
    try:
        with torch.device("meta"):
            model = load_family(family).Model(section.model, vocab_size)
        count = sum(p.numel() for p in model.parameters())
        yield Row(f"{run} parameters", "ok", f"{count:,}")
        found = verify(family, section.model, vocab_size, pick_device(settings.runtime.device))
    except (KumikiError, RuntimeError) as error:  # no memory for it, or a broken model
        yield Row(f"model {run}", "fail", str(error).splitlines()[0], remedy=f"see {family}.py")
        return
    for name, good in found.items():
        told, state = ("holds", "ok") if good is True else (str(good), "fail")
        yield Row(f"{run} {name}", state, told, remedy=f"see lib/models/{family}.py")  # type: ignore[arg-type]  # one of State
