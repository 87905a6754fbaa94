"""Engines that split a model over the ranks: how the Trainer is told to use them, also on CPUs.

gpu_checks.py and tests/engines.py train with these settings.
"""

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

WHOLE = ("stage3_param_persistence_threshold", "stage3_max_live_parameters")
WHOLE += ("stage3_max_reuse_distance",)
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """TrainingArguments of DeepSpeed's ZeRO 1, 2 or 3. `more` goes into DeepSpeed's config."""
    config = {
        # By default ZeRO 3 keeps parameters below 100,000 numbers whole.
        "zero_optimization": {"stage": stage, **dict.fromkeys(WHOLE, 0)},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto",
        **dict.fromkeys(BATCH, "auto"),
    }
    return {"deepspeed": {**config, **more}, **_on_cpu(ACCELERATE_USE_DEEPSPEED="true")}


def fsdp2(layer: str, state_dict: str = "SHARDED_STATE_DICT") -> dict[str, Any]:
    """TrainingArguments of accelerate's FSDP2.

    Args:
        layer: The class of the layers, which are split one by one. By default accelerate takes
            those that the model names, and fails if embeddings of images are among them.
        state_dict: What a checkpoint holds: "SHARDED_STATE_DICT" or "FULL_STATE_DICT".
    """
    config = {"transformer_layer_cls_to_wrap": [layer], "state_dict_type": state_dict}
    # Lower versions of transformers take version 1 by default.
    settings = {"fsdp": True, "fsdp_config": {"version": 2, **config}, **_on_cpu()}
    if not torch.cuda.is_available():
        # Accelerate looks at FSDP only if it sees several GPUs. What it then does runs by gloo too.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return settings


def _on_cpu(**environment: str) -> dict[str, Any]:
    """Without a GPU: tell accelerate of the ranks before the Trainer does, which would say "CPU".

    With `use_cpu=True` accelerate leaves DeepSpeed and FSDP out. Without it, and without a backend,
    each process is the only one to it.
    """
    if torch.cuda.is_available():
        return {}
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process
    PartialState(backend="gloo")
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
