"""The bar says what there is to count, and no more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from qlora_pl.training.watching.progress import EpochBar, default_bars


@pytest.mark.parametrize(("max_epochs", "said"), [(-1, "Epoch 1"), (3, "Epoch 1/2")])
def test_the_bar_counts_epochs_only_where_they_end_the_run(max_epochs: int, said: str) -> None:
    """Epochs are counted from 0, so that the last of three is epoch 2."""
    bar = EpochBar()
    bar._trainer = SimpleNamespace(  # type: ignore[assignment]
        max_epochs=max_epochs, num_training_batches=5, max_steps=4, global_step=2
    )
    assert bar._get_train_description(1).strip() == said
    assert bar.total_train_batches == 5


def test_a_bar_that_was_chosen_or_switched_off_stays_so() -> None:
    assert [type(bar) for bar in default_bars([], None)] == [EpochBar]
    assert default_bars([TQDMProgressBar()], True) == []
    assert default_bars([], False) == []
