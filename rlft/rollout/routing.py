"""Whether rollouts come with the experts that the engine chose, and the passes of training take them."""

from __future__ import annotations

from rlft.config.run import Engine as Options
from rlft.errors import ConfigError
from rlft.models.policy import Policy
from rlft.routes import MOST


def replays(policy: Policy, options: Options, engine: str) -> tuple[bool, str]:
    """Return whether an engine reports its experts, and a line that says so; "" for a model without experts.

    engine: "vllm" or "eager". Raises ConfigError where `engine.routing_replay` is true and cannot be honoured.
    """
    reason = _hindrance(policy, engine)
    if reason is not None and options.routing_replay is True:
        raise ConfigError(f'engine.routing_replay = true: {reason}; set "auto" or false')
    if reason is None and options.routing_replay is False:
        reason = "engine.routing_replay = false"
    if not policy.mixtures:
        return False, ""
    if reason is not None:
        return False, f"routing replay is off: {reason}; each pass of training chooses experts by itself"
    layers = f"{policy.mixtures} layer{'s' * (policy.mixtures > 1)}"
    return True, f"routing replay: training takes the experts that vLLM chose, in {layers}"


def _hindrance(policy: Policy, engine: str) -> str | None:
    """Return why the experts of an engine cannot be taken in training; None if they can."""
    if not policy.mixtures:
        return "the model has no layers of experts"
    if engine != "vllm":
        return "the eager engine does not report the experts that it chooses"
    if policy.experts > MOST:
        return f"{policy.experts} experts of a layer, and their numbers are held in 16 bits, up to {MOST}"
    return policy.fixed_routing
