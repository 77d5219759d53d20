"""The public preconditioner: when to measure, refresh and apply. The mathematics lies in the files it calls."""

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, Protocol, Unpack

import torch
from torch import Tensor, nn

from kfac_sua.preconditioner import invert
from kfac_sua.preconditioner.checkpoint.checks import check_numbers, check_outline
from kfac_sua.preconditioner.checkpoint.in_place import written_over
from kfac_sua.preconditioner.checkpoint.layer_checks import check_findings
from kfac_sua.preconditioner.checkpoint.versions import STATE_VERSION, check_state, up_to_date
from kfac_sua.preconditioner.distributed.assignment import checked_flops_per_byte
from kfac_sua.preconditioner.distributed.collectives import Processes, default_processes
from kfac_sua.preconditioner.distributed.inversion import SharedInversion
from kfac_sua.preconditioner.events import (
    EventLog,
    GradientEvent,
    checked_loss_factor,
    drop_statistics,
    layers_to_precondition,
    nothing_recorded,
    report_frozen,
    report_gradient_events,
    report_missing,
    report_other_examples,
    report_small_damping,
    usable_inverse,
)
from kfac_sua.preconditioner.factors import finite_layers
from kfac_sua.preconditioner.fisher import fisher_cotangents, within_generator
from kfac_sua.preconditioner.forms.accumulator import Scalings
from kfac_sua.preconditioner.host_copy import HostCopy
from kfac_sua.preconditioner.kl_clip import KLClip
from kfac_sua.preconditioner.large import warn_of_large_layers
from kfac_sua.preconditioner.layer import PreconditionedLayer, take_inverses
from kfac_sua.preconditioner.model.capture import Capture
from kfac_sua.preconditioner.model.changes import ModelWatch, is_frozen
from kfac_sua.preconditioner.model.compiled import UncompiledWhileRecording, compiled_modules
from kfac_sua.preconditioner.model.discovery import discover_layers, log_plain_layers, preconditioned
from kfac_sua.preconditioner.model.wrappers import bare_model
from kfac_sua.preconditioner.phases import Phase, PhaseSource
from kfac_sua.preconditioner.plain_numbers import checked_integer, shown
from kfac_sua.preconditioner.precision import application_precision, at_least_float32, factor_precision
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.report import LayerTable, layer_table, report_sharing
from kfac_sua.preconditioner.settings import (
    FisherType,
    KroneckerOptions,
    KroneckerSettings,
    LossReduction,
    checked_damping,
    settings_from,
    signature_with_settings,
)
from kfac_sua.preconditioner.structures.structure import FisherStructure

_COPY_CURE = "make one for the other model and give it load_state_dict(preconditioner.state_dict())"


class GradientObserver(Protocol):
    """Observes the plain gradients of the steps that it wants."""

    def wants(self, step: int) -> bool:
        """Return whether it wants the gradients of this step, counted from 0."""

    def observe(self) -> None:
        """Called when every ``.grad`` is the plain gradient, after a refresh that is due."""

    def forget(self) -> None:
        """Called when what was observed no longer counts."""


class KroneckerPreconditioner:
    """Preconditions gradients with a Kronecker-factored Fisher: K-FAC, SUA, channel groups, and their combinations.

    Around an ordinary loop, for the empirical Fisher::

        preconditioner = KroneckerPreconditioner(model, structure="sua", group_size=32, damping=0.1)
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss_function(model(inputs), labels).backward()
            preconditioner.step()  # replaces .grad of Linear and Conv2d layers, in place
            optimizer.step()

    With ``fisher_type="mc"`` or ``"exact"`` call ``preconditioner.fisher_backward(outputs)`` between the forward pass
    and ``loss.backward()``. Parameters of all other layers keep the plain gradient; :meth:`describe` names them.

    On mini-batches whose statistics are due, a pass counts if its weight gradients are in ``.grad`` at :meth:`step`;
    other passes leave no trace. Put passes whose gradients are in ``.grad`` but must not count inside :meth:`paused`.
    A gradient is preconditioned once. With a ``GradScaler``::

        scaler.scale(loss_function(model(inputs), labels)).backward()
        scaler.unscale_(optimizer)
        preconditioner.step(loss_scale=scaler.get_scale())  # skips the mini-batches that scaler.step() skips
        scaler.step(optimizer)
        scaler.update()

    Numerical faults stay within their layer, are counted in :attr:`events` and logged once. Statistics with a NaN or an
    infinity are dropped, and running average and inverse stay as they were; a layer without an inverse keeps the plain
    gradient until its first good refresh. A block that cannot be inverted is tried again in float64 and then with up to
    1000 times the damping; if that fails too, the layer keeps its last good inverse. Only a layer's *first* inverse
    must succeed: if finite statistics cannot be inverted, the damping is too small.

    The model may be wrapped in ``DistributedDataParallel`` or ``torch.compile``: give the object that the loop calls;
    layers have their names in the bare model. A compiled model runs uncompiled on mini-batches with statistics, and
    compiled on all others. The model may be moved to another device or precision between steps, and layers may be
    frozen; layers that become trainable, are replaced or added later need a new preconditioner. Clip gradients after
    :meth:`step`, which bounds what the optimizer gets; clipping before it, under ``application="weight"``, scales the
    preconditioned gradient by the same factor as the plain one. Do not use it with an optimizer that evaluates a
    closure several times (``LBFGS``): that one needs gradients of its loss and would get preconditioned directions.

    The per-example loss is averaged (``loss_reduction="mean"``) or summed over the first dimension of the layers'
    inputs. With gradient accumulation, the accumulated gradient must be that of the mean over all micro-batches.

    Args:
        model: Any module, wrapped or not; its ``nn.Linear`` and ``nn.Conv2d`` layers are preconditioned.
        settings: All settings at once; then no option may be given.
        seed: Seed of the sampled labels of ``fisher_type="mc"``, any integer.
        distributed: Average the statistics over the processes of ``torch.distributed``'s default group, if there is one
            when the preconditioner is made; then all of them must take every step together.
        flops_per_byte: FLOPs of inversion that such a process does in the time in which it receives a byte, ≥ 0: a
            block is inverted by one process for all where that is cheaper than by each. 0 shares out all blocks,
            infinity none; ``None`` takes ``assignment.FLOPS_PER_BYTE``. It has no influence on results beyond rounding.
        **options: Each setting by itself, under the names, with the defaults and within the ranges of
            :class:`KroneckerSettings`. ``damping`` may also be a function from the number of steps taken to ε. A
            damping enters with each refresh; see :attr:`damping` and ``damping_schedule.py``.

    Raises:
        ValueError: If a setting is out of range, no layer of the model can be preconditioned, or it is wrapped in
            ``nn.DataParallel``.
        TypeError: If there is no such option, the model is no module, the settings are no :class:`KroneckerSettings`,
            or ``distributed`` is neither True nor False.

    Reference: Laurent et al. (2018); Grosse & Martens (2016) for ``expand``; Martens & Grosse (2015) for the pi rule.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: KroneckerSettings | None = None,
        seed: int = 0,
        distributed: bool = True,
        flops_per_byte: float | None = None,
        **options: Unpack[KroneckerOptions],
    ) -> None:
        self.settings = settings_from(settings, options)
        damping = options.get("damping")
        self._damping_function = damping if callable(damping) else None
        self._damping = self.settings.damping
        flops_per_byte = checked_flops_per_byte(flops_per_byte)
        self._kl_scale: Tensor | None = None
        self.seed = seed
        self._model = bare_model(model)
        self.num_steps = 0
        self._events = EventLog()
        if not isinstance(distributed, bool):
            raise TypeError(f"distributed must be True or False, got {shown(distributed)}.")
        self._structure: type[FisherStructure[Any]] = structure_class(self.settings.structure)
        self._processes = default_processes() if distributed else None
        if self._processes is not None and not self._structure.can_be_shared:
            raise ValueError(
                f"structure={self.settings.structure} measures each process's examples by themselves, and cannot be "
                f"averaged over {self._processes.size} processes; train on one process, use structure=kfac or sua, or "
                f"give distributed=False where every process has a model of its own."
            )
        self._shared_inversion: SharedInversion | None = None
        if self._processes is not None and self._structure.shares_inversion:
            self._shared_inversion = SharedInversion(self._processes, flops_per_byte)
        self._phases = PhaseSource()
        self._observer: weakref.ref[GradientObserver] | None = None
        self._discovered = discover_layers(self._model, self.settings.skip)
        log_plain_layers(self._discovered)
        self._watch = ModelWatch(self._model, self._discovered, self.settings.skip)
        num_processes = self._processes.size if self._processes else 1
        self._layers = {
            name: PreconditionedLayer.make(name, module, geometry, self.settings, self._phases, num_processes)
            for name, module, geometry in preconditioned(self._discovered)
        }
        warn_of_large_layers(layer_table(self._discovered, self._layers, self.settings).large)
        self._capture = Capture(
            self._model,
            {name: layer.module for name, layer in self._layers.items()},
            {name: layer.statistics for name, layer in self._layers.items()},
            self._phases,
            from_training_loss=self.settings.fisher_type is FisherType.empirical,
        )
        self._replaced: list[UncompiledWhileRecording | PreconditionedLayer] = [*self._layers.values()]
        self._run_uncompiled(compiled_modules(model))
        self._fisher_passes = 0
        self._gradient_flags: HostCopy | None = None
        # The hooks must not outlive the preconditioner: they would go on recording for nobody.
        self._release = weakref.finalize(self, _release, self._capture, self._replaced)
        self._begin_step()

    # --- what -------------------------------------------------------------------------------------------------------

    @property
    def events(self) -> Counter[str]:
        """Number of events, under ``kind:layer``: failed inverses, dropped statistics, …."""
        return self._events.counts

    @property
    def damping(self) -> float:
        """Tikhonov ε of the next refresh. A new value takes effect then; until then the inverses at hand stay.

        ``settings.damping`` remains the value that training started with.

        Raises:
            ValueError: If it is set to anything but a number > 0, or if it is a function of the step.
        """
        function = self._damping_function
        return self._damping if function is None else checked_damping(function(self.num_steps))

    @damping.setter
    def damping(self, value: float) -> None:
        if self._damping_function is not None:
            raise ValueError(
                "damping was given as a function of the step, which decides it; make the preconditioner with a number "
                "to set it or to adapt it."
            )
        self._damping = checked_damping(value)

    @property
    def seed(self) -> int:
        """Seed of the sampled labels, any integer."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = checked_integer("seed", value)

    @property
    def kl_scale(self) -> Tensor | None:
        """Factor by which ``kl_clip`` scaled the last step, a 0-d tensor on the device; ``None`` before the first step.

        The next step writes over it.
        """
        return self._kl_scale

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def layers(self) -> tuple[PreconditionedLayer, ...]:
        """The preconditioned layers."""
        return tuple(self._layers.values())

    @property
    def processes(self) -> Processes | None:
        """The processes that share a mini-batch; ``None`` if there is but one."""
        return self._processes

    # --- when -------------------------------------------------------------------------------------------------------

    @property
    def factor_period(self) -> int:
        """Mini-batches between two measurements of the statistics."""
        return self.settings.factor_period or self.settings.inverse_period

    @property
    def statistics_due(self) -> bool:
        """Whether the coming :meth:`step` needs statistics of its mini-batch."""
        return self.num_steps % self.factor_period == 0

    @property
    def inverses_due(self) -> bool:
        """Whether the coming :meth:`step` refreshes the inverses."""
        return self.num_steps % self.settings.inverse_period == 0

    @property
    def step_is_plain(self) -> bool:
        """Whether the coming :meth:`step` only applies the inverses at hand: no statistics, no refresh, no observer."""
        is_recording = self.statistics_due or self._capture.enabled
        return not (is_recording or self.inverses_due) and self._interested_observer() is None

    @property
    def why_not_captured(self) -> str:
        """Why steps that apply its structure cannot be captured, as a clause; empty if they can."""
        if self._structure.can_be_captured:
            return ""
        return f"structure={self.settings.structure} does not say that its application can be captured"

    @property
    def phase(self) -> Phase:
        """Called with ``"statistics"``, ``"inversion"`` or ``"application"``, gives the context the work runs in."""
        return self._phases.phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phases.phase = phase

    # --- verbs ------------------------------------------------------------------------------------------------------

    def capture(self) -> AbstractContextManager[None]:
        """Record statistics of the passes inside, due or not, for loops that do not call :meth:`step`."""
        self._check_in_use()
        return self._recording(True)

    def paused(self) -> AbstractContextManager[None]:
        """Neither record nor precondition inside: for passes that are not part of the training step.

        Passes that change no ``.grad``, such as those of an attack or for logging, do not need it. Gradients of forward
        passes made inside are plain, unless they are added to gradients preconditioned in the backward pass.
        """
        return self._paused()

    def observe_gradients(self, observer: GradientObserver) -> None:
        """Let an observer see the plain gradients of the steps that it wants, and keep the factors of refreshes.

        It replaces an earlier observer. The preconditioner holds only a weak reference to it.
        """
        self._observer = weakref.ref(observer)
        for layer in self._layers.values():
            layer.keeps_factors = True
        self._begin_step()

    def discard(self) -> None:
        """Forget the passes since the last step, for a mini-batch that is abandoned after its backward pass.

        Zero its gradients yourself.
        """
        self._forget_passes()
        for layer in self._layers.values():
            layer.discard_gradient()

    def go_to_step(self, num_steps: int) -> None:
        """Set the number of steps taken, for steps made without :meth:`step`, such as replays of a captured one.

        Call it between two steps.

        Args:
            num_steps: Steps taken before the coming one, ≥ 0.
        """
        self.num_steps = checked_integer("num_steps", num_steps)
        self._begin_step()

    def fisher_backward(self, outputs: Tensor) -> None:
        """Send the Fisher's cotangents backward from the model's outputs, if statistics are being recorded.

        Does nothing for the empirical Fisher and on mini-batches without statistics. Leaves every ``.grad`` alone and
        retains the graph for the training loss.

        Args:
            outputs: Outputs of the forward pass that has just run: logits ``[examples, classes]`` for a categorical
                likelihood, any shape for a Gaussian one.

        Raises:
            ValueError: If the outputs do not fit ``settings.likelihood``.
        """
        self._check_in_use()
        if not self._capture.enabled or self.settings.fisher_type is FisherType.empirical:
            return
        generator = torch.Generator(outputs.device)
        generator.manual_seed(within_generator(self.seed * 1_000_003 + self.num_steps * 1_009 + self._fisher_passes))
        self._fisher_passes += 1
        place = self._processes.locate_examples(len(outputs), outputs.device) if self._processes else None
        if not outputs.numel():
            return  # no examples; the other processes were told
        cotangents = fisher_cotangents(outputs, self.settings.fisher_type, self.settings.likelihood, generator, place)
        self._capture.backward(outputs, cotangents)

    def step(
        self, *, loss_scale: float | None = None, loss_weight: float = 1.0, lr: float | Tensor | None = None
    ) -> bool:
        """Precondition the gradients in place, first measuring and refreshing what is due.

        Call it after ``loss.backward()`` and before ``optimizer.step()``, once per optimisation step; with a
        ``GradScaler`` between ``scaler.unscale_(optimizer)`` and ``scaler.step(optimizer)``.

        Args:
            loss_scale: Factor > 0 by which the loss was multiplied, a ``GradScaler``'s ``get_scale()``. If it is given,
                a mini-batch in which a gradient of the model is not finite is skipped whole, as the scaler does; that
                check waits for the device once.
            loss_weight: Another factor > 0 by which the loss was multiplied: if processes have parts of a mini-batch of
                different sizes, ``num_processes · part / whole`` makes the average of their gradients right.
            lr: Learning rate ≥ 0 that the optimizer will use for the preconditioned layers. Only ``kl_clip`` reads it.

        Returns:
            False if the mini-batch was skipped. It then leaves no trace, and the next one takes its place.

        Raises:
            ValueError: If ``loss_scale`` or ``loss_weight`` is not a finite number > 0, or ``lr`` is missing where
                ``kl_clip`` is on.
            RuntimeError: If statistics are due but none were recorded, all gradients have been preconditioned before,
                the first inverse of a layer fails, the model's layers have changed since the preconditioner was made or
                are still on device meta, or its hooks were removed.
        """
        self._check_in_use()
        clip = self._make_clip(lr)
        if loss_scale is not None:
            loss_scale = checked_loss_factor("loss_scale", loss_scale)
            if not self._has_finite_gradients():
                self.discard()
                return False
        self._follow_model()
        layers = layers_to_precondition(self._layers.values(), self._events)
        if self.statistics_due:
            scale = 1.0 if loss_scale is None else loss_scale
            self._measure(scale, loss_weight, is_judged=not self._inversion_judges, needs_gradients=True)
        else:  # measuring checks the gradients itself
            for layer in layers:
                if layer.adds_to_preconditioned:
                    GradientEvent.ADDED_TO_USED.report(layer.name, self._events)
        if self.inverses_due:
            self.update_inverses()
        self._report_gradient_events()
        observer = self._interested_observer()
        if observer is not None:
            observer.observe()
        self._precondition_(clip, layers)
        self.num_steps += 1
        self._begin_step()
        return True

    @torch.no_grad()
    def update_factors(self, *, loss_scale: float = 1.0, loss_weight: float = 1.0) -> None:
        """Turn what was recorded into factors, or into the running average of factors.

        Args:
            loss_scale: As in :meth:`step`; the output gradients of the training loss are divided by it.
            loss_weight: As in :meth:`step`; they are divided by it too.

        Raises:
            ValueError: If ``loss_scale`` or ``loss_weight`` is not a finite number > 0.
            RuntimeError: If nothing was recorded, or a part of it cannot be used.
        """
        self._check_in_use()
        self._measure(loss_scale, loss_weight, is_judged=True, needs_gradients=False)
        self._report_gradient_events()

    @torch.no_grad()
    def _measure(self, loss_scale: float, loss_weight: float, *, is_judged: bool, needs_gradients: bool) -> None:
        """Turn what was recorded into factors; see :meth:`update_factors`.

        Args:
            loss_scale: As in :meth:`step`.
            loss_weight: As in :meth:`step`.
            is_judged: Check at once whether factors are finite, which waits for the device.
            needs_gradients: Leave out layers whose gradients are not in ``.grad`` any more.
        """
        loss_scale = checked_loss_factor("loss_scale", loss_scale)
        loss_weight = checked_loss_factor("loss_weight", loss_weight)
        with self._phases.phase("statistics"), factor_precision():
            settled = self._capture.settle(needs_gradients=needs_gradients)
            is_empirical = self.settings.fisher_type is FisherType.empirical
            mean_loss = is_empirical and self.settings.loss_reduction is LossReduction.mean
            scale = loss_scale * loss_weight if is_empirical else 1.0  # fisher_backward() does not send the scaled loss
            scalings = Scalings()
            try:
                measured = {
                    name: layer.statistics.factors(
                        grads_of_mean_loss=mean_loss, loss_scale=scale, scalings=scalings, inverse=layer.inverse
                    )
                    for name, layer in self._layers.items()
                }
                scalings.carry_out()
                report_other_examples(self._layers.values(), self._events)
            finally:  # a refused mini-batch must not spoil the next one
                self._capture.clear()
                self._fisher_passes = 0
            flags = settled.flags
            if self._processes is not None:
                layers = self._layers.values()
                structures = [layer.structure for layer in layers]
                likes = [at_least_float32(layer.weight.detach()) for layer in layers]
                averaged = self._structure.average_over_processes(
                    structures, [*measured.values()], likes, self._processes
                )
                measured = dict(zip(measured, averaged, strict=True))
                counts = flags.float()
                self._processes.all_reduce_(counts, "checks")
                flags = counts > 0
            self._gradient_flags = HostCopy(flags)
            present = {name: factors for name, factors in measured.items() if factors is not None}
            if not present and not settled.empty:
                raise RuntimeError(nothing_recorded(self.settings.fisher_type))
            for name, layer in self._layers.items():
                if name not in present:
                    report_missing(layer, self._events, is_gone=name in settled.gone, was_empty=name in settled.empty)
            finite = finite_layers(list(present.values())) if is_judged else [True] * len(present)
            for (name, factors), is_finite in zip(present.items(), finite, strict=True):
                if is_finite:
                    self._layers[name].add_measurement(factors)
                else:
                    drop_statistics(self._layers[name], self._events)

    @torch.no_grad()
    def update_inverses(self) -> None:
        """Invert the damped factors of every layer that has new ones, blocks of equal size in one call.

        Raises:
            RuntimeError: If a layer's first inverse fails.
        """
        layers = [layer for layer in self._layers.values() if layer.is_fresh]
        structures = [layer.structure_at_hand for layer in layers]
        with self._phases.phase("inversion"), factor_precision():
            factors = [layer.average.corrected() for layer in layers]
            settings = dataclasses.replace(self.settings, damping=self.damping)
            are_small = HostCopy(self._structure.small_dampings(factors, settings)) if layers else None
            refreshed = self._structure.refresh(structures, factors, settings, self._shared_inversion or invert)
            new = []
            try:
                for layer, result, factors_used in zip(layers, refreshed, factors, strict=True):
                    if result.num_failed and not factors_used.is_finite():
                        drop_statistics(layer, self._events)
                        layer.forget_measurement()
                        continue
                    inverse = usable_inverse(layer, result, settings, self._events)
                    if inverse is not None:
                        new.append((layer, inverse))
                    layer.finish_refresh(factors_used)
            finally:  # where the first inverse of a layer fails, the layers before it keep their new ones
                take_inverses(new)
            if are_small is not None:
                taken = {layer.name for layer, _ in new}
                for layer, is_small in zip(layers, are_small.read_flags(), strict=True):
                    if is_small and layer.name in taken:
                        report_small_damping(layer.name, self._events, settings)

    def precondition_(self, *, lr: float | Tensor | None = None) -> None:
        """Replace the gradients of the preconditioned layers in place, with the inverses at hand.

        Args:
            lr: As in :meth:`step`.

        Raises:
            ValueError: If ``kl_clip`` is on and ``lr`` is missing, negative or not finite.
        """
        self._check_in_use()
        self._precondition_(self._make_clip(lr), layers_to_precondition(self._layers.values(), self._events))

    def describe(self) -> LayerTable:
        """Return a row per layer: structure, blocks, sizes, memory, FLOPs and forms, or why it keeps its gradient.

        With several processes the table also says what each of them inverts and sends.
        """
        table = layer_table(self._discovered, self._layers, self.settings)
        if self._shared_inversion is None:
            return table
        like = at_least_float32(next(iter(self._layers.values())).weight.detach())
        layouts = [layer.layout for layer in self._layers.values()]
        sharing = report_sharing(self._shared_inversion, layouts, self.settings, like)
        return dataclasses.replace(table, sharing=sharing)

    def remove_hooks(self) -> None:
        """Restore the model as it was; the preconditioner cannot be used afterwards."""
        self._release()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: the copy would belong to a model that nobody has."""
        raise TypeError(f"A preconditioner belongs to one model and cannot be copied; {_COPY_CURE}.")

    def __reduce__(self) -> NoReturn:
        """Refuse, for the same reason."""
        raise TypeError(f"A preconditioner belongs to one model and cannot be pickled or copied; {_COPY_CURE}.")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a bit-exact continuation needs, keyed by layer name.

        Nested dicts of tensors, numbers and strings, loadable with ``torch.load(..., weights_only=True)``. Take it
        between two steps. As in PyTorch's own state dicts the tensors are those in use, and later steps write over
        them: keep a ``copy.deepcopy``.
        """
        return {
            "version": STATE_VERSION,
            "num_steps": self.num_steps,
            "seed": self.seed,
            "settings": self.settings.to_plain(),
            "damping": self.damping,
            "events": dict(self.events),
            "layers": {name: layer.state_dict() for name, layer in self._layers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a preconditioner of the same model and settings.

        The damping continues with its last value, or with the function that the preconditioner was made with. The
        state's tensors are copied.

        Raises:
            ValueError: If the state has another version, other settings or other layers, or an entry that no such
                preconditioner can have; the message names it, and nothing is changed.
        """
        state = self._checked_state(state)
        prepared = [layer.prepare_state(state["layers"][name]) for name, layer in self._layers.items()]
        for take in prepared:  # nothing can fail any more
            take()
        self.num_steps, self.seed = state["num_steps"], state["seed"]
        self._damping = float(state["damping"])
        self._events.counts = Counter(state["events"])
        self._forget_passes()
        observer = None if self._observer is None else self._observer()
        if observer is not None:
            observer.forget()
        self._begin_step()

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would raise for a state, and change nothing.

        Raises:
            ValueError: As :meth:`load_state_dict`.
        """
        self._checked_state(state)

    # --- inside -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _checked_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a state in today's version, after checking all of it."""
        check_outline(state)
        state = up_to_date(state, self.settings)
        passed_over = {"damping"} if self._damping_function else set()
        check_state(state, self.settings, set(self._layers), passed_over)
        check_numbers(state)
        if self._damping_function is not None:
            checked_damping(self._damping_function(state["num_steps"]))
        check_findings(
            finding for name, layer in self._layers.items() for finding in layer.state_findings(state["layers"][name])
        )
        return state

    @contextmanager
    def _recording(self, enabled: bool) -> Iterator[None]:
        before, self._capture.enabled = self._capture.enabled, enabled
        try:
            yield
        finally:
            self._capture.enabled = before

    @contextmanager
    def _paused(self) -> Iterator[None]:
        leaves_out = self._capture.is_paused
        were_paused = [layer.pause(True) for layer in self._layers.values()]
        self._capture.is_paused |= self._capture.enabled
        try:
            with self._recording(False):
                yield
        finally:
            self._capture.is_paused = leaves_out
            for layer, was_paused in zip(self._layers.values(), were_paused, strict=True):
                layer.pause(was_paused)

    def _begin_step(self) -> None:
        """Record statistics from now on if they are due; else let layers apply inverses in the backward pass."""
        if self._capture.was_compiled:  # the model was compiled after this was made
            self._run_uncompiled([self._model])
        self._capture.enabled = self.statistics_due
        plain_gradient = self.statistics_due or self._interested_observer() is not None
        for layer in self._layers.values():
            layer.begin_step(plain_gradient=plain_gradient)

    def _interested_observer(self) -> GradientObserver | None:
        """Return the observer if it wants the gradients of the coming step."""
        observer = None if self._observer is None else self._observer()
        return observer if observer is not None and observer.wants(self.num_steps) else None

    def _make_clip(self, lr: float | Tensor | None) -> KLClip | None:
        return None if self.settings.kl_clip is None else KLClip(self.settings.kl_clip, lr)

    @torch.no_grad()
    def _precondition_(self, clip: KLClip | None, layers: Sequence[PreconditionedLayer]) -> None:
        """Precondition the gradients of some layers, and report all that are frozen."""
        with self._phases.phase("application"), application_precision():
            missing = {layer.name: layer.take_missing_sides() for layer in self._layers.values()}  # may raise, so first
            for layer in layers:
                with nullcontext() if clip is None else clip.measuring(layer.preconditioned_grads):
                    layer.precondition_(missing[layer.name])
            if clip is not None:
                scale = clip.scale_()
                self._kl_scale = None if scale is None else written_over(self._kl_scale, scale, scale)
        for layer in layers:
            layer.mark_preconditioned()
        for layer in self._layers.values():
            if is_frozen(layer.module):
                report_frozen(layer, self._events)

    def _report_gradient_events(self) -> None:
        """Report the layers whose gradient is not that of their recorded calls alone."""
        if self._gradient_flags is not None:
            report_gradient_events(list(self._layers), self._gradient_flags.read_flags(), self._events)
            self._gradient_flags = None

    def _check_in_use(self) -> None:
        """Refuse every use after the hooks were removed."""
        if not self._release.alive:
            raise RuntimeError(
                "The hooks of this preconditioner were removed, so that it cannot be used any more: make a new one, "
                "which may continue with load_state_dict(preconditioner.state_dict())."
            )

    def _run_uncompiled(self, modules: Iterable[nn.Module]) -> None:
        """Let compiled modules run uncompiled while statistics are recorded."""
        self._capture.was_compiled = False
        self._replaced += [UncompiledWhileRecording(module, self._capture) for module in modules]

    @property
    def _inversion_judges(self) -> bool:
        """Whether the coming inversion tells which of the coming statistics are not finite, at no cost."""
        return self.inverses_due and self._structure.finds_non_finite(self.settings)

    def _forget_passes(self) -> None:
        self._capture.forget()
        self._fisher_passes = 0

    def _has_finite_gradients(self) -> bool:
        """Return whether the gradients of all parameters are finite; waits for the device once."""
        grads = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        return bool(nn.utils.get_total_norm(grads, norm_type=math.inf).isfinite())

    def _follow_model(self) -> None:
        """Follow the model to another device or precision; refuse a model whose trainable layers have changed."""
        self._watch.check(thoroughly=self.statistics_due)
        for layer in self._layers.values():
            layer.follow_weight()


KroneckerPreconditioner.__init__.__signature__ = signature_with_settings(  # type: ignore[attr-defined]
    KroneckerPreconditioner.__init__
)


def _release(capture: Capture, replaced: Sequence[UncompiledWhileRecording | PreconditionedLayer]) -> None:
    capture.remove()
    for one in reversed(replaced):
        one.remove()
