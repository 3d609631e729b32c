"""Overridden methods of the library's trainer: a rename there must fail loudly, never leave dead code behind."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
from transformers import Seq2SeqTrainer, Trainer

from utils.train import trainer as module
from utils.train.overrides import overrides
from utils.train.trainer import SftTrainer

# Methods of the library's trainer that are replaced. Each costs care: a release of the library may change it.
PUBLIC = {
    'train', 'evaluate', 'compute_loss', 'training_step', 'prediction_step', 'evaluation_loop', 'create_scheduler',
    'get_batch_samples', 'get_train_dataloader', 'get_eval_dataloader', 'floating_point_ops',
}  # fmt: skip
PRIVATE = {
    '_get_train_sampler', '_get_grad_norm', '_determine_best_metric', '_save_checkpoint', '_save',
    '_load_from_checkpoint', '_load_optimizer_and_scheduler', '_load_rng_state', '_clip_grad_norm', '_run_epoch',
    '_finalize_training', '_build_accelerator_args', '_prepare_for_training', '_get_num_items_in_batch',
    '_prepare_inputs', '_maybe_log_save_evaluate',
}  # fmt: skip
# Private methods and attributes of the library's trainer that are used without being replaced.
USED = {
    '_tr_loss', '_globalstep_last_logged', '_train_batch_size',
    '_created_lr_scheduler',
}  # fmt: skip


def test_the_overrides_are_those_listed() -> None:
    marked = {name for name, value in vars(SftTrainer).items() if hasattr(value, '__overrides__')}
    assert marked == PUBLIC | PRIVATE


def test_nothing_of_the_base_class_is_replaced_without_a_mark() -> None:
    replaced = {name for name, value in vars(SftTrainer).items() if callable(value) and hasattr(Seq2SeqTrainer, name)}
    assert replaced - {'__init__', '__repr__'} == PUBLIC | PRIVATE


def test_what_is_used_of_the_base_class_is_there() -> None:
    source = inspect.getsource(Trainer)
    assert not [name for name in USED if not (hasattr(Trainer, name) or f'self.{name} = ' in source)]


@pytest.mark.parametrize('name', sorted(PUBLIC | PRIVATE))
def test_a_method_that_the_library_renames_fails_when_the_class_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cls in (Seq2SeqTrainer, *Seq2SeqTrainer.__mro__[1:]):
        if name in vars(cls):
            monkeypatch.delattr(cls, name)
    with pytest.raises(TypeError, match=f'Seq2SeqTrainer.{name} is overridden here, and this version'):
        importlib.reload(module)


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Restore the class of the module, so that other modules keep using the same one."""
    kept = dict(vars(module))
    yield
    vars(module).update(kept)


def test_parameters_of_another_name_or_order_are_refused() -> None:
    class Base:
        def step(self, model: Any, inputs: Any) -> None: ...

    with pytest.raises(TypeError, match=r'Base.step takes \(self, model, inputs\), the method .* \(self, inputs\)'):

        class Renamed(Base):
            @overrides(Base)
            def step(self, inputs: Any) -> None: ...

    with pytest.raises(TypeError, match='takes'):

        class Short(Base):
            @overrides(Base)
            def step(self, model: Any) -> None: ...

    class Whole(Base):
        @overrides(Base)
        def step(self, model: Any, **rest: Any) -> None: ...

    assert Whole.step.__overrides__.endswith('Base.step')  # type: ignore[attr-defined]
