"""One run of a comparison in a process of its own, so that its peak of memory is its own.

    python -m jora.compare.worker DIRECTORY      # holds job.json; gets train/, training.json, rows.jsonl, result.json

Whatever is finished is kept: training goes on from its last checkpoint, and is not repeated for an evaluation that
was interrupted.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jora.compare.results import (
    JOB,
    RESULT,
    TRAINING,
    Result,
    Training,
    read_json,
    read_training,
    write_json,
    write_result,
)
from jora.errors import InputError
from jora.reporting import Reporter

if TYPE_CHECKING:
    from jora.cli.train_command import Options
    from jora.methods.method import Adapter
    from jora.models.model import Model
    from jora.train import TrainResult


def main() -> None:
    """Exit code 130 when interrupted; a mistake of the user's is a result like any other."""
    from jora.ui.progress import reporter_for

    directory = Path(sys.argv[1])
    job = read_json(directory / JOB)
    try:
        with reporter_for(sys.stderr) as reporter:
            result = run(directory, job, reporter)
    except InputError as error:
        result = Result(job["label"], job["seed"], error=str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    write_result(directory / RESULT, result)


def run(directory: Path, job: dict[str, Any], reporter: Reporter) -> Result:
    """Train (unless the job is the base's) and evaluate.

    Raises:
        InputError: from loading, training (a loss that is not finite) or evaluation.
    """
    from jora.cli.common import open_model
    from jora.cli.options import read_values
    from jora.cli.train_command import Options

    options = read_values(Options, job["options"], job["label"])
    model = open_model(options, reporter)
    import jora

    training = adapter = None
    if job["train"]:
        training = _train(directory, model, options, reporter)
        model, adapter = _written(directory, model, options, reporter)
    scores = jora.evaluate(
        model, job["eval_data"], adapter, **job["evaluation"], out=directory / "rows.jsonl", reporter=reporter
    )
    return Result(job["label"], job["seed"], scores.metrics(), training, machine())


def _train(directory: Path, model: Model, options: Options, reporter: Reporter) -> Training:
    """Train, or read what an earlier process noted after it had trained."""
    import jora

    if (directory / TRAINING).exists():
        return read_training(read_json(directory / TRAINING))
    begun = (directory / "train" / "config.yaml").exists()
    result = jora.train(
        model,
        options.build_method(),
        options.data,
        out=directory / "train",
        options=dataclasses.replace(options.training, resume=begun),
        reporter=reporter,
    )
    training = measure(result, peak_bytes(model))
    write_json(directory / TRAINING, dataclasses.asdict(training))
    return training


def _written(directory: Path, model: Model, options: Options, reporter: Reporter) -> tuple[Model, Adapter | None]:
    """What training wrote, which is what gets scored: an adapter, or a whole model by full fine-tuning."""
    import jora
    from jora.cli.common import open_model

    whole = directory / "train" / "model"
    if whole.is_dir():
        return open_model(dataclasses.replace(options, model=str(whole)), reporter), None
    return model, jora.load_adapter(directory / "train" / "adapter", model)


def measure(result: TrainResult, peak: int) -> Training:
    """The numbers of a finished training."""
    import jax

    steps = [line for line in result.history if "loss" in line]
    gaps = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(steps)
    ]
    files = [*result.directory.glob("adapter/*.safetensors"), *result.directory.glob("model/*.safetensors")]
    return Training(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(result.adapter.state.trained)),
        adapter_bytes=sum(file.stat().st_size for file in files),
        steps=result.steps,
        seconds=steps[-1]["seconds"],
        seconds_a_step=round(statistics.median(gaps) if gaps else steps[-1]["seconds"] / steps[-1]["step"], 4),
        peak_bytes=peak,
        curve=tuple((line["seconds"], line["loss"]) for line in steps),
    )


def peak_bytes(model: Model) -> int:
    """The most that the fullest device held; on a CPU, the most that this process held."""
    from jora.train import memory

    if any(device.memory_stats() for device in model.layout.mesh.devices.flat):
        return memory.peak_bytes(model.layout)
    return _process_peak()


def _process_peak() -> int:
    # Linux's getrusage counts what the parent held when it started us; /proc does not.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> str:
    """Devices and versions, in a line."""
    import jax

    import jora

    devices = jax.local_devices()
    kind = devices[0].device_kind if devices[0].platform != "cpu" else f"CPU ({_cores()} cores)"
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{kind}, jax {jax.__version__}, jora {jora.__version__}"


def _cores() -> int:
    import os

    # What this process may use, where the system says so (a container may have less than the machine).
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
