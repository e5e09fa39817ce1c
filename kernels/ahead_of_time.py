"""What the GPU's compiler makes of the kernels, without a GPU: registers, spills, shared memory, tensor cores.

Every `Specimen` of the kernels is compiled for the compute capabilities it is meant for, and what came out is judged.
Run as ``python -m diffaccel.kernels.ahead_of_time [--json FILE] [--specimen GLOB] [--target 90] [--sample]``. `report`
does so, since compiling needs a process of its own: where Triton's interpreter is switched on, nothing can be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel.kernels._candidates import cache_file

if TYPE_CHECKING:
    from diffaccel.kernels._launch import Specimen

MODULES = (
    *("token_quantize", "int8_gemm", "fp8_gemm", "sparse_attention", "permute_tokens"),
    *("w4a8_gemm", "w4a16_gemm", "hadamard_quantize", "static_quantize"),
)
# KiB of shared memory that one block can have (CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability"); Triton checks it only when it launches.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
# Columns of tensor memory of an SM, which only data center Blackwell has.
_TENSOR_MEMORY = 512
# Multiply instructions of the tensor cores in SASS: the form made for the chip, then an older one that still runs (for
# fp8 on 16-bit copies). The newer wants tiles of 64 (sm_90) or 128 (sm_100) rows: kernels for few tokens use the older.
INSTRUCTIONS: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "int8": {80: ("IMMA",), 89: ("IMMA",), 90: ("IGMMA", "IMMA"), 100: ("UTCIMMA", "IMMA"), 120: ("IMMA",)},
    "fp8": {89: ("QMMA",), 90: ("QGMMA", "HMMA"), 100: ("UTCQMMA", "HMMA"), 120: ("QMMA",)},
    "16-bit": {80: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA"), 120: ("HMMA",)},
}
_MULTIPLY = re.compile(r"\b((?:UTC)?[IHQ]G?MMA)\b")


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration on one compute capability.

    Attributes:
        specimen: name of the `Specimen`.
        target: compute capability, 90 for 9.0.
        registers: per thread, at most 255.
        stack: bytes per thread that did not fit the registers; each is a trip to memory.
        shared: bytes of shared memory of a block.
        multiply: the tensor cores' instructions found, such as ``("HMMA",)``.
        older: the instruction is not the form made for this chip.
        problems: what is wrong; empty if nothing is.
    """

    specimen: str
    target: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    multiply: tuple[str, ...] = ()
    older: bool = False
    problems: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """In words."""
        return "; ".join(self.problems) or ("fine, older tensor-core instruction" if self.older else "fine")


def report(specimen: str = "*", targets: Iterable[int] = tuple(SHARED_KIB), sample: bool = False) -> list[Row]:
    """Compile in a process of its own; what was compiled before comes from Triton's cache in ours.

    Args:
        specimen: glob over the specimens' names.
        targets: compute capabilities.
        sample: only every sixth pair of specimen and target.

    Raises:
        RuntimeError: the process failed; without Triton it always does.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "diffaccel.kernels.ahead_of_time", "--json", str(file), "--specimen", specimen]
        command += [part for target in targets for part in ("--target", str(target))]
        command += ["--sample"] if sample else []
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(f"the kernels cannot be compiled here: {done.stderr.strip()[-2000:]}")
        return read_rows(file)


def read_rows(file: Path) -> list[Row]:
    """What ``--json`` wrote."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [Row(**{**row, "multiply": tuple(row["multiply"]), "problems": tuple(row["problems"])}) for row in rows]


def specimens() -> list[Specimen]:
    """Those of all kernels. Imports Triton."""
    found = [s for name in MODULES for s in import_module(f"diffaccel.kernels.{name}").SPECIMENS]
    names = [s.name for s in found]
    assert len(names) == len(set(names)), "two specimens have the same name"
    return found


def compile_specimen(specimen: Specimen, target: int) -> Row:
    """Compile one and judge it. Only in a process without ``TRITON_INTERPRET``."""
    from triton.compiler import CompilationError, compile  # noqa: A004
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        binary = compile(*_source(specimen, target), options=_options(specimen))
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        return Row(specimen.name, target, problems=(f"does not compile: {' '.join(lines[-3:])[:300]}",))
    registers, stack, multiply = _read_binary(binary.asm["cubin"], specimen.tensor_cores is not None)
    metadata = binary.metadata
    return judge(specimen, target, registers, stack, metadata.shared, getattr(metadata, "tmem_size", 0) or 0, multiply)


def judge(
    specimen: Specimen, target: int, registers: int, stack: int, shared: int, tensor_memory: int, multiply: set[str]
) -> Row:
    """The verdict on what the compiler made."""
    problems = []
    if stack:
        problems.append(f"spills: {stack} bytes of stack per thread")
    if shared > SHARED_KIB[target] * 1024:
        problems.append(f"needs {shared} bytes of shared memory, the chip has {SHARED_KIB[target] * 1024}")
    if tensor_memory > _TENSOR_MEMORY:
        problems.append(f"needs {tensor_memory} columns of tensor memory, the chip has {_TENSOR_MEMORY}")
    older = False
    if specimen.tensor_cores is not None:
        forms = INSTRUCTIONS[specimen.tensor_cores][target]
        if not multiply.intersection(forms):
            found = ", ".join(sorted(multiply)) or "none"
            problems.append(f"no {specimen.tensor_cores} tensor cores: expected {' or '.join(forms)}, found {found}")
        older = forms[0] not in multiply
    return Row(specimen.name, target, registers, stack, shared, tuple(sorted(multiply)), older, tuple(problems))


def _source(specimen: Specimen, target: int) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**specimen.constants, **specimen.config.tiles}
    names = specimen.kernel.arg_names
    given = {*specimen.types, *constants}
    if given != set(names):
        raise ValueError(f"{specimen.name}: arguments {sorted(given ^ set(names))} are missing, or not the kernel's")
    types = {name: specimen.types.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in specimen.aligned]
    source = ASTSource(
        specimen.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return source, GPUTarget("cuda", target, 32)


def _options(specimen: Specimen) -> dict[str, int | bool]:
    config = specimen.config
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": specimen.fp_fusion}


def _read_binary(cubin: bytes, disassemble: bool) -> tuple[int, int, set[str]]:
    """Registers and bytes of stack per thread, and, which takes longer, multiply instructions of the tensor cores."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", *(["-sass"] if disassemble else []), file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, "cuobjdump reported no registers"
    return int(usage[1]), int(usage[2]), set(_MULTIPLY.findall(text))


def main() -> None:
    """Compile and print, or write, the rows; exit code 1 if one is not fine."""
    parser = argparse.ArgumentParser(prog="python -m diffaccel.kernels.ahead_of_time", description=main.__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--specimen", default="*", help="glob over the specimens' names")
    parser.add_argument("--target", type=int, action="append", choices=list(SHARED_KIB), help="90 for 9.0; several")
    parser.add_argument("--sample", action="store_true", help="every sixth only")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("Triton's interpreter compiles nothing; unset TRITON_INTERPRET")
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_file().parent / "triton"))
    chosen = [s for s in specimens() if fnmatchcase(s.name, arguments.specimen)]
    wanted = arguments.target or list(SHARED_KIB)
    pairs = [(s, target) for s in chosen for target in s.targets if target in wanted]
    if arguments.sample:
        pairs = pairs[::6]  # most specimens have five targets: of neighbours it is another one each time
    # Two at a time: half of the time passes in ptxas, a process of its own.
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda pair: compile_specimen(*pair), pairs))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    else:
        for row in rows:
            figures = f"{row.registers} registers, {row.shared} bytes shared, {' '.join(row.multiply) or '-'}"
            print(f"sm_{row.target:<4}{row.specimen:<50}{figures:<50}{row.verdict}")
    sys.exit(any(row.problems for row in rows))


if __name__ == "__main__":
    main()
