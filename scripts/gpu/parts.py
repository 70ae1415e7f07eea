"""The parts of the proof, most valuable first, so that a run that is cut off leaves what matters most."""

from dataclasses import dataclass

TOTAL_SECONDS = 540  # of all parts together
LEAST_SECONDS = 15  # with less time left a part is not started: imports alone take about that

# Sizes that parts measure → presets of scripts/bench/presets.py.
PRESETS = {
    "240p": "xl2-240p",
    "360p": "xl2-360p",
    "720p": "xl2-720p",
    "wan-1.3b": "wan-1.3b-480p",
    "wan-ti2v-5b": "wan-ti2v-5b-480p",
}
# By calculation steps at 720p with all thirty would take longer than the part; the others cost as much each.
FEWER_STEPS = "default;scheduler.num_sampling_steps=8"


@dataclass(frozen=True)
class Part:
    """One part: a process of its own.

    Args:
        limit: seconds after which it is stopped; what it has measured until then is kept.
        function: ``module:name`` below ``scripts.gpu``, called with the report, ``small`` and ``arguments``.
        shows: what it shows, for ``--list`` and the page.
        needs_gpu: whether it may be added without a GPU to a proof that was made on one.
    """

    name: str
    limit: float
    function: str
    shows: str
    arguments: tuple[str, ...] = ()
    needs_gpu: bool = True


PARTS = (
    Part("machine", 60, "machine:measure", "card, driver, versions; rates of a matrix product and of a copy"),
    Part("phases", 100, "steps:phases", "Open-Sora XL/2 at 240p, phase by phase", ("240p",)),
    Part("plain", 130, "steps:against_plain", "the same step without the savings", ("240p",)),
    Part("360p", 70, "steps:cost", "Open-Sora XL/2 at 360p", ("360p",)),
    Part("720p", 100, "steps:cost", "Open-Sora XL/2 at 720p", ("720p", FEWER_STEPS)),
    Part("nf4", 60, "steps:stored", "the step at 240p with weights in 4 bits", ("base_quant=nf4",)),
    Part(
        "kernels",
        100,
        "checks:run",
        "fused attention, no waiting in the loop, dtypes, streamed blocks, advice when memory runs out",
        ("fused", "waits", "dtype", "memory", "streamed"),
    ),
    Part("wan-1.3b", 90, "steps:cost", "Wan 1.3B at 480p, 81 frames", ("wan-1.3b",)),
    Part("wan-ti2v-5b", 100, "steps:cost", "Wan TI2V-5B at 480p, 121 frames", ("wan-ti2v-5b",)),
    Part("graph", 60, "prefix:graph", "the steps without a gradient as a CUDA graph", ("240p",)),
    Part(
        "runs",
        130,
        "checks:run",
        "kill and resume; two processes on one card, with the frozen weights whole and split; compiled blocks",
        ("killed", "processes", "compiled"),
    ),
    Part("compile", 120, "prefix:compiled", "the same steps with compiled blocks", ("240p",)),
    Part("fp8", 60, "steps:stored", "the step at 240p with weights in 8 bits", ("dtype=fp8",)),
    Part(
        "streamed", 60, "steps:stored", "the step at 240p with blocks from the CPU", ("stream_blocks=True",)
    ),
    Part("predictor", 100, "predictor:compare", "predicted peaks, by scripts/estimate.py", needs_gpu=False),
)
BY_NAME = {part.name: part for part in PARTS}
