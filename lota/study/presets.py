"""How large a study is: base, data, steps, rates, seeds; and which tasks play which part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lota.study import world
from lota.study.prepare import DataConfig
from lota.study.pretrain import BaseConfig

Rates = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Tasks:
    """old, new: of question 2. sequence: of question 3. unlike: of question 4, tasks of several kinds."""

    old: str
    new: str
    sequence: tuple[str, ...]
    unlike: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        """Every task that has rows, those about safety too."""
        named = (self.old, self.new, *self.sequence, *self.unlike)
        return tuple(dict.fromkeys([*named, "policy", "harmless", "harmful", "refused"]))


MADE_UP = Tasks(world.NEW[0], world.NEW[1], world.NEW, (world.NEW[0], "reverse", "answer"))
REAL = Tasks("sql", "math", ("sql", "math", "reasoning", "summary", "instruct"), ("sql", "math", "reasoning"))


@dataclass(frozen=True)
class Preset:
    """rates: learning rates of every method's sweep, the same number for each. pulls: values of K. levels: shares of
    what full fine-tuning gains on the new task, at which forgetting is compared; main_level: of the headline. methods:
    of question 2, all of them where it is empty."""

    name: str
    base: BaseConfig
    data: DataConfig
    tasks: Tasks = MADE_UP
    steps: int = 120
    batch_rows: int = 16
    micro_rows: int = 16
    calibration_steps: int = 60
    calibration_rate: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    alphas: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4)
    pulls: tuple[float, ...] = (3.0, 10.0, 30.0)
    densities: tuple[float, ...] = (0.5, 0.1, 0.01, 0.001)
    levels: tuple[float, ...] = (0.9, 0.95, 0.98, 1.0)
    main_level: float = 0.98
    rates: Rates = field(default_factory=lambda: RATES)
    bf16: bool = False
    methods: tuple[str, ...] = ()
    questions: tuple[str, ...] = ("q2", "q1", "q3", "q4", "q5")

    def middle(self, sweep: str) -> float:
        """The middle one of a sweep's rates."""
        return self.rates[sweep][(len(self.rates[sweep]) - 1) // 2]


RATES: Rates = {
    "full": (3e-4, 1e-3, 3e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "0.5": (5e-4, 2e-3, 5e-3),
    "0.3": (1e-3, 3e-3, 1e-2),
    "0.1": (3e-3, 1e-2, 3e-2),
    "0.01": (1e-2, 3e-2, 1e-1),
    "0.001": (3e-2, 1e-1, 3e-1),
}

CPU = Preset("cpu", BaseConfig(), DataConfig(max_length=64, num_test=192))
TEXT = replace(
    CPU,
    base=BaseConfig(vocab_size=4096, max_length=192, batch_rows=11, steps=2500, learning_rate=1.5e-3),
    data=DataConfig(vocab_size=4096, max_length=192, num_train=2400, num_dev=48, num_test=160, num_general=160),
    tasks=REAL,
    steps=200,
    batch_rows=8,
    micro_rows=8,
    alphas=(1.0, 0.7, 0.45),
)
SMOKE = replace(
    CPU,
    name="smoke",
    base=BaseConfig(vocab_size=640, hidden_size=64, num_layers=2, steps=60, save_every=25),
    data=DataConfig(
        vocab_size=640, max_length=64, num_texts=3000, num_train=128, num_dev=16, num_test=24, num_general=24
    ),
    steps=8,
    calibration_steps=6,
    seeds=(0,),
    alphas=(1.0, 0.5),
    pulls=(3.0, 30.0),
    densities=(0.5, 0.1),
    rates={name: rates[1:] for name, rates in RATES.items()},
    questions=("q2", "q5"),
)
GPU = replace(
    CPU,
    name="gpu",
    base=BaseConfig(
        vocab_size=8192, hidden_size=1024, num_layers=12, num_heads=16, max_length=256, steps=12000, batch_rows=64,
        learning_rate=6e-4, save_every=1000,
    ),
    data=DataConfig(vocab_size=8192, max_length=256, num_texts=400000, num_train=12800, num_dev=128, num_test=512),
    steps=300,
    calibration_steps=150,
    calibration_rate=1e-4,
    rates={name: tuple(rate / 10 for rate in rates) for name, rates in RATES.items()},
    bf16=True,
)  # fmt: skip
PRESETS = {preset.name: preset for preset in (CPU, SMOKE, GPU)}


def chosen(name: str, has_data: bool) -> Preset:
    """The preset of that name, for real text where there are data."""
    preset = PRESETS[name]
    if not has_data:
        return preset
    if name == "cpu":
        return TEXT
    length = max(192, preset.base.max_length)
    return replace(
        preset,
        tasks=REAL,
        base=replace(preset.base, max_length=length),
        data=replace(preset.data, max_length=length, num_train=min(2400, preset.data.num_train)),
    )
