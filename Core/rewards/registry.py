"""Scorers by name, or by the file that holds one."""

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from Core.rewards.base import SHARED_ARGUMENTS, Reward, RewardInfo
from Core.rewards.user_files import RewardFileError, blamed, contract_errors
from Core.utils.damage import loading, refuse_damaged
from Core.utils.files import path_fault
from Core.utils.hub import present
from Core.utils.registry import Registry

# A new scorer is one file and one line here.
REGISTRY: Registry[Reward] = Registry(
    "reward",
    {
        "aesthetic": "Core.rewards.aesthetic:Aesthetic",
        "aesthetic_v2_5": "Core.rewards.aesthetic_v2_5:AestheticV25",
        "hps": "Core.rewards.hps:HPS",
        "hpsv3": "Core.rewards.hpsv3:HPSv3",
        "aesthetic_hps": "Core.rewards.mixture:AestheticHPS",
        "pick_score": "Core.rewards.pick_score:PickScore",
        "image_reward": "Core.rewards.image_reward:ImageRewardV1",
        "clip_score": "Core.rewards.clip_score:ClipScore",
        "actpred": "Core.rewards.actpred:ActionPrediction",
        "compression": "Core.rewards.compression:Compression",
        "incompressibility": "Core.rewards.compression:Incompressibility",
        "rainy": "Core.rewards.weather:Rainy",
        "snowy": "Core.rewards.weather:Snowy",
        "weather": "Core.rewards.weather:Weather",
        "object_detection": "Core.rewards.object_detection:ObjectDetection",
        "vjepa": "Core.rewards.vjepa:VJepa",
        "videoalign": "Core.rewards.videoalign:VideoAlign",
        "motion": "Core.rewards.guards:Motion",
        "sharpness": "Core.rewards.guards:Sharpness",
        "saturation": "Core.rewards.guards:Saturation",
        "subject_consistency": "Core.rewards.vbench:SubjectConsistency",
        "background_consistency": "Core.rewards.vbench:BackgroundConsistency",
        "temporal_flickering": "Core.rewards.vbench:TemporalFlickering",
        "motion_smoothness": "Core.rewards.vbench:MotionSmoothness",
        "dynamic_degree": "Core.rewards.vbench:DynamicDegree",
        "relative": "Core.rewards.wrappers:Relative",
        "hinge": "Core.rewards.wrappers:Hinge",
        "command": "Core.rewards.command:Command",
    },
    otherwise=', or your own as "path/to/my_reward.py:MyReward"',
)
register = REGISTRY.register


def resolve_reward(name: str) -> type[Reward]:
    """The class behind a registered name or behind "path/to/file.py:Class".

    Raises:
        ValueError: there is none; the message says why.
    """
    if isinstance(name, str) and ".py:" in name and name not in REGISTRY:
        return _class_from_file(name)
    return REGISTRY.resolve(name)


def construct(name: str, args: Mapping[str, Any]) -> Reward:
    """Instantiate a scorer; the arguments that every scorer takes are set on the instance."""
    cls = resolve_reward(name)
    args = cls.passed_on(args)
    own = {key: value for key, value in args.items() if key not in SHARED_ARGUMENTS}
    with blamed(cls.origin, "in its constructor"), reading(name, cls, args):
        reward = cls(**own)
    reward.slice_size = args.get("slice_size", reward.slice_size)
    reward.placement = torch.device(args["device"]) if args.get("device") else None
    return reward


@contextmanager
def reading(name: str, cls: type[Reward], args: Mapping[str, Any]) -> Iterator[None]:
    """Read weights of ``cls(**args)`` in the block; ValueError where they are damaged. A user's scorer answers for
    itself."""
    weights = cls.required_weights(args).values()
    if cls.origin or not weights:
        yield
        return
    for place in filter(None, map(present, weights)):
        refuse_damaged(place)
    with loading(f"reward {name!r}", [weight.source for weight in weights]):
        yield


def named_errors(cls: type[Reward], args: Mapping[str, Any]) -> list[str]:
    """``cls.config_errors``, where a user's file may fail as well."""
    try:
        with blamed(cls.origin, "on its arguments"):
            return cls.config_errors(args)
    except RewardFileError as error:
        return [str(error)]


def _class_from_file(spec: str) -> type[Reward]:
    """Import ``Class`` from "path/to/file.py:Class"; ValueError says what it lacks."""
    path, _, attribute = spec.rpartition(":")
    if fault := path_fault(path):
        raise ValueError(f"reward {spec[:80]!r}: {fault}")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"reward {spec!r}: there is no file {path!r}")
    found = getattr(_import_file(file), attribute, None)
    if not (isinstance(found, type) and issubclass(found, Reward)):
        raise ValueError(
            f"reward {spec!r}: {path!r} has no class {attribute!r} derived from Core.rewards.Reward"
        )
    if faults := contract_errors(found, RewardInfo):
        raise ValueError(f"reward {spec!r}: {'; '.join(faults)}")
    found.origin = f"{file}:{attribute}"
    return found


def _import_file(file: Path) -> ModuleType:
    """The module in a Python file outside the package, imported once."""
    name = f"reward_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with blamed(str(file), "on import"):
                spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
