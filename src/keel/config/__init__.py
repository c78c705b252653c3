"""The run's configuration: one pydantic model per stage, read from YAML with dotted overrides.

An unknown key names its nearest match; a setting that would have no effect is refused. What is derived
(micro-batches per step, number of steps) is computed where it is used and never stored.
"""

from keel.config.best_of_n import BestOfNConfig
from keel.config.classifier import ClassifierConfig
from keel.config.collect import CollectConfig
from keel.config.distill import DistillConfig
from keel.config.evaluate import EvaluateConfig
from keel.config.grpo import GRPOConfig
from keel.config.on_policy import KLConfig, OnPolicy, PtxConfig, ShapingConfig
from keel.config.online_dpo import OnlineDPOConfig
from keel.config.parts import (
    DataConfig,
    FilteredSamplingConfig,
    InitConfig,
    LoraConfig,
    ModelConfig,
    SamplingConfig,
)
from keel.config.ppo import PPOConfig
from keel.config.preference import DPOConfig
from keel.config.reading import parse, read
from keel.config.run import KINDS, AnyStage, RunConfig
from keel.config.settings import Settings
from keel.config.stage import Stage, Supervised, Training
from keel.config.supervised import PretrainConfig, RewardConfig, SFTConfig

__all__ = [
    "KINDS",
    "AnyStage",
    "BestOfNConfig",
    "ClassifierConfig",
    "CollectConfig",
    "DPOConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "FilteredSamplingConfig",
    "GRPOConfig",
    "InitConfig",
    "KLConfig",
    "LoraConfig",
    "ModelConfig",
    "OnPolicy",
    "OnlineDPOConfig",
    "PPOConfig",
    "PretrainConfig",
    "PtxConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "Settings",
    "ShapingConfig",
    "Stage",
    "Supervised",
    "Training",
    "parse",
    "read",
]
