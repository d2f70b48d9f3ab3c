"""Prunes a little at a time while the model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from tersetorch.methods.arguments import check_choice, check_flag, check_int, check_number
from tersetorch.methods.distributed import take_from_rank_0
from tersetorch.methods.parametrization import live_weights
from tersetorch.methods.prune.magnitude import Scope, Sparsity, choose, magnitude
from tersetorch.methods.prune.patterns import blocks
from tersetorch.methods.selection import Patterns

Schedule = Literal["cubic", "linear"]

# How much of the way from the initial to the final sparsity is done when the part p of the steps is.
PROGRESS: dict[str, Callable[[float], float]] = {"cubic": lambda p: 1 - (1 - p) ** 3, "linear": lambda p: p}


class GradualPruner:
    """Raises a model's sparsity along a curve, by magnitude, once every `frequency` calls of step.

    The n-th call of step is step n; step 0 is the construction. At begin_step, begin_step + frequency, ... and at
    end_step the model is pruned to

        s_t = s_f + (s_i - s_f) * (1 - (t - begin_step) / (end_step - begin_step))^3      ("cubic")

    with s_i the initial and s_f the final sparsity, or to the straight line between them ("linear"). Before begin_step
    nothing is pruned, after end_step the masks stay. Every pruning is prune.magnitude's: what is pruned stays pruned.

    Building one attaches the masks, so that the state of a model in mid-course can be loaded. A run that is resumed
    from the states of model, optimizer and pruner gives the same bits as one that was not stopped.

    Under torch.distributed every rank has rank 0's masks: construction and step are collective calls.

    Example:
        pruner = GradualPruner(model, sparsity=0.9, begin_step=0, end_step=1000, frequency=50)
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()

    Args:
        model: as in prune.magnitude; pruned in place.
        sparsity: the final sparsity, as in prune.magnitude.
        begin_step: the first step that prunes, at least 0.
        end_step: the last step that prunes, more than begin_step.
        frequency: steps between prunings, at least 1; the last one comes at end_step in any case.
        initial_sparsity: the sparsity at begin_step, at most the final one.
        schedule: "cubic" or "linear".
        scope: as in prune.magnitude.
        pattern: blocks "RxC" as in prune.magnitude, or None.
        targets: as in prune.magnitude.
        ignore: as in prune.magnitude.
        broadcast: False where each rank of torch.distributed trains a model of its own.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range, or as prune.magnitude.

    Source:
        Zhu and Gupta, To prune, or not to prune (2017), equation 1. Where we differ: end_step is given instead of the
        number of prunings.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity,
        *,
        begin_step: int = 0,
        end_step: int,
        frequency: int = 100,
        initial_sparsity: float = 0.0,
        schedule: Schedule = "cubic",
        scope: Scope = "layer",
        pattern: str | None = None,
        targets: Patterns | None = None,
        ignore: Patterns | None = None,
        broadcast: bool = True,
    ) -> None:
        where = "prune.GradualPruner"
        check_int(where, "begin_step", begin_step, 0)
        check_int(where, "end_step", end_step, begin_step + 1)
        check_int(where, "frequency", frequency, 1)
        check_number(where, "initial_sparsity", initial_sparsity, 0, 1)
        check_choice(where, "schedule", schedule, get_args(Schedule))
        check_flag(where, "broadcast", broadcast)
        if sparsity is None:
            raise TypeError(f"{where}: sparsity must be a number or a mapping, got None; pass the final sparsity")
        for target, final in choose(where, model, sparsity, scope, targets, ignore, blocks(where, pattern)):
            if final < initial_sparsity:
                raise ValueError(
                    f"{where}: initial_sparsity must be at most the final sparsity {final} of {target.name!r}, got "
                    f"{initial_sparsity}; lower it"
                )
        self.model = model
        self.final_sparsity: Sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else float(sparsity)
        self.initial_sparsity = float(initial_sparsity)
        self.begin_step = begin_step
        self.end_step = end_step
        self.frequency = frequency
        self.schedule = schedule
        self.scope: Scope = scope
        self.pattern = pattern
        self.targets = targets
        self.ignore = ignore
        self.broadcast = broadcast
        self._step = 0
        self._prune()

    @property
    def sparsity(self) -> Sparsity:
        """What the latest pruning aimed at, of the form that sparsity was given in; 0 before begin_step."""
        done = min(self._step, self.end_step) - self.begin_step
        if done < 0:
            return self._each(lambda final: 0.0)
        if self._step < self.end_step:
            done -= done % self.frequency
        progress = PROGRESS[self.schedule](done / (self.end_step - self.begin_step))
        start = self.initial_sparsity
        # At the end the final sparsity itself, not start + (final - start), which rounding may move.
        return self._each(lambda final: final if progress == 1 else start + (final - start) * progress)

    def step(self) -> None:
        """Counts a step of training and prunes when one is due; call it after the optimizer's step.

        Raises:
            ValueError: as prune.magnitude, such as for NaN among the weights; the step is not counted then.
        """
        self._step += 1
        ramping = self.begin_step <= self._step < self.end_step
        if self._step == self.end_step or (ramping and (self._step - self.begin_step) % self.frequency == 0):
            try:
                self._prune()
            except ValueError:
                self._step -= 1
                raise

    def state_dict(self) -> dict[str, int]:
        """Where the pruner stands; the masks are in the model's state."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that state_dict gave; load the model's own state as well.

        Raises:
            TypeError: the state is no mapping, or its step no int.
            ValueError: the state is not of a GradualPruner.
        """
        where = "prune.GradualPruner.load_state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(f"{where}: state must be a dict, got {type(state).__name__}; pass what state_dict gave")
        if set(state) != {"step"}:
            raise ValueError(f"{where}: state must hold just 'step', got {sorted(state)}; pass what state_dict gave")
        check_int(where, "state['step']", state["step"], 0)
        self._step = state["step"]

    def _prune(self) -> None:
        magnitude(
            self.model,
            self.sparsity,
            scope=self.scope,
            pattern=self.pattern,
            targets=self.targets,
            ignore=self.ignore,
        )
        if self.broadcast:
            masks = {live.compressed: live.compressed.mask for live in live_weights(self.model)}
            take_from_rank_0(self.model, list(masks.values()))

    def _each(self, rule: Callable[[float], float]) -> Sparsity:
        if isinstance(self.final_sparsity, Mapping):
            return {pattern: rule(final) for pattern, final in self.final_sparsity.items()}
        return rule(self.final_sparsity)
