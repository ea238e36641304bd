"""TRL's own trainer, trained for some steps: what it does with the advantages of histories."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pgrpo import ClusterNormalizer, ConfigError, DataError
from pgrpo.errors import CheckpointError

if sys.version_info < (3, 11):
    pytest.skip("TRL 1.16 needs Python 3.11", allow_module_level=True)

import tiny_trl
from trl.trainer.grpo_trainer import GRPOTrainer

from pgrpo.integrations import adapter
from pgrpo.integrations.trl import personalize


def counts(normalizer: ClusterNormalizer) -> float:
    return sum(stats.count for stats in normalizer.snapshot().values())


def moments(state: Any) -> list[Any]:
    """Count, mean and m2 of each cluster."""
    count, origin, offset, m2 = (np.array(state[k]) for k in ("count", "origin", "offset", "m2"))
    return [count, origin + offset, m2]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained(folder: Path, normalizer: ClusterNormalizer | None, **settings: Any) -> Any:
    trainer = tiny_trl.trainer(folder, normalizer, **settings)
    trainer.train()
    return trainer


def test_grpo_through_pgrpo_is_trls_grpo(tmp_path: Path) -> None:
    # Making a trainer seeds all that it draws, so one is trained before the other is made.
    plain, ours = (
        trained(tmp_path / name, normalizer, max_steps=8)
        for name, normalizer in (
            ("plain", None),
            ("ours", ClusterNormalizer("grpo", ddof=1, eps=1e-4)),
        )
    )
    start = torch.cat([p.detach().flatten() for p in tiny_trl.model().parameters()])
    moved = (weights(plain) - start).abs().max().item()
    assert moved > 1e-3
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-4, atol=1e-4 * moved)
    for one, other in zip(plain.state.log_history, ours.state.log_history, strict=True):
        for name in {"grad_norm", "reward", "entropy", "completions/mean_length"} & one.keys():
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-4, abs=1e-6)


def test_histories_make_another_run_of_it(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", None)
    ours = trained(tmp_path / "ours", ClusterNormalizer("pgrpo"))
    assert not torch.allclose(weights(ours), weights(plain), rtol=0, atol=1e-4)


def test_every_rollout_is_counted_once(tmp_path: Path) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    trainer = tiny_trl.trainer(
        tmp_path,
        normalizer,
        evaluation=tiny_trl.rows(8),
        eval_strategy="steps",
        eval_steps=2,
        num_iterations=2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_steps=8,
    )
    trainer.train()
    # 8 steps of 2 micro-batches; each generation of 4 micro-batches of 8 is trained on twice.
    assert counts(normalizer) == 8 * 2 / (4 * 2) * (4 * 8)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_logs_tell_clusters_apart(tmp_path: Path) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    trainer = tiny_trl.trainer(tmp_path, normalizer, log_completions=True, max_steps=2)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
    for cluster, stats in normalizer.snapshot().items():
        assert last[f"clusters/{cluster}/history_count"] == stats.count
        assert last[f"clusters/{cluster}/history_mean"] == pytest.approx(stats.mean)
    assert any(name.endswith("/advantage") for name in last)
    table = pq.read_table(max((tmp_path / "completions").iterdir())).to_pydict()
    assert set(table["cluster"]) <= {"c0", "c1", "c2"}
    assert table["advantage"] == list(trainer._logs["advantages"])
    for cluster in set(table["cluster"]):
        rows = zip(table["cluster"], table["advantage"], strict=True)
        mean = np.mean([advantage for name, advantage in rows if name == cluster])
        assert last[f"clusters/{cluster}/advantage"] == pytest.approx(mean)


@pytest.mark.parametrize(
    "middle", [False, True], ids=["at a save", "in the middle of a generation"]
)
def test_a_resumed_run_counts_nothing_twice(tmp_path: Path, middle: bool) -> None:
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 1,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
    }
    # A generation is two steps long.
    at = 3 if middle else 4
    whole = ClusterNormalizer("pgrpo")
    unbroken = tiny_trl.trainer(tmp_path / "run", whole, **settings)
    unbroken.train()
    normalizer = ClusterNormalizer("pgrpo")
    resumed = tiny_trl.trainer(tmp_path / "again", normalizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{at}"))
    found, expected = normalizer.snapshot(), whole.snapshot()
    assert {c: s.count for c, s in found.items()} == {c: s.count for c, s in expected.items()}
    if not middle:
        assert normalizer.state_dict() == whole.state_dict()
        assert torch.equal(weights(resumed), weights(unbroken))


def test_a_checkpoint_of_plain_trl_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    tiny_trl.trainer(tmp_path, None, **settings).train()
    trainer = tiny_trl.trainer(tmp_path / "again", ClusterNormalizer("pgrpo"), **settings)
    with pytest.raises(CheckpointError, match="saved without pgrpo"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_two_ranks_have_the_histories_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def start(folder: Path, per_rank: int, rank: int, size: int) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        script = Path(__file__).parent / "trl_ranks.py"
        return subprocess.Popen(
            [sys.executable, str(script), str(folder), str(per_rank)], env=environment
        )

    two = [start(tmp_path / "two", 8, rank, 2) for rank in range(2)]
    assert [process.wait(240) for process in two] == [0, 0]
    assert start(tmp_path / "one", 16, 0, 1).wait(240) == 0
    ranks = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in range(2)]
    alone = json.loads((tmp_path / "one" / "rank0.json").read_text())
    assert ranks[0]["state"] == ranks[1]["state"]
    assert ranks[0]["state"]["clusters"] == alone["state"]["clusters"]
    counts, means, m2s = zip(moments(ranks[0]["state"]), moments(alone["state"]), strict=True)
    assert counts[0].tolist() == counts[1].tolist()
    for found, expected in (means, m2s):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert min(m2s[0]) > 0
    np.testing.assert_allclose(ranks[0]["advantages"], alone["advantages"], rtol=1e-12)


def test_a_class_made_from_trls_keeps_what_it_does(tmp_path: Path) -> None:
    class Own(GRPOTrainer):
        seen = 0

        def _calculate_rewards(self, *args: Any) -> Any:
            self.seen += 1
            return 2 * super()._calculate_rewards(*args)

    normalizer = ClusterNormalizer("pgrpo")
    trainer = tiny_trl.trainer(tmp_path, normalizer, base=Own, max_steps=2)
    trainer.train()
    assert isinstance(trainer, Own) and type(trainer).__name__ == "PersonalizedOwn"
    assert trainer.seen == 2
    assert personalize(Own) is personalize(Own)


def test_columns_that_nobody_reads_may_be_removed(tmp_path: Path) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    tiny_trl.trainer(
        tmp_path,
        normalizer,
        lambda completions, **_: [float(len(c)) for c in completions],
        remove_unused_columns=True,
        max_steps=1,
    ).train()
    assert counts(normalizer) == 8


def test_mistakes_are_told_before_training(tmp_path: Path) -> None:
    normalizer = ClusterNormalizer("pgrpo")
    with pytest.raises(ConfigError, match=r"cluster_column is 'kind'.*prompt, cluster_id"):
        tiny_trl.trainer(tmp_path, normalizer, cluster_column="kind")
    with pytest.raises(ConfigError, match="expected a pgrpo.ClusterNormalizer"):
        tiny_trl.trainer(tmp_path, "pgrpo")  # type: ignore[arg-type]

    def first(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    def second(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    several: dict[str, Any] = {
        "multi_objective_aggregation": "normalize_then_sum",
        "reward_weights": [1.0, 2.0],
    }
    with pytest.raises(ConfigError, match=r"reward_weights=\[1.0, 2.0\], reward_names=\['first'"):
        tiny_trl.trainer(tmp_path, normalizer, [first, second], **several)
    wrong = ClusterNormalizer("pgrpo", reward_weights=[2, 1], combine="normalize_then_sum")
    with pytest.raises(ConfigError, match="has other rewards than the trainer"):
        tiny_trl.trainer(tmp_path, wrong, [first, second], **several)
    with pytest.raises(ConfigError, match="expected TRL's GRPOTrainer"):
        personalize(dict)


def test_a_row_without_a_cluster_is_refused(tmp_path: Path) -> None:
    data = (
        tiny_trl.rows()
        .to_iterable_dataset()
        .map(lambda row: {"prompt": row["prompt"]}, remove_columns=["cluster_id"])
    )
    trainer = tiny_trl.trainer(
        tmp_path,
        ClusterNormalizer("pgrpo"),
        lambda completions, **_: [0.0] * len(completions),
        data,
    )
    with pytest.raises(DataError, match=r"no column 'cluster_id'.*it has prompt"):
        trainer.train()


def test_the_lines_of_the_readme_train(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "personalize" in c)
    tiny_trl.model().save_pretrained(tmp_path / "model")
    tiny_trl.tokenizer().save_pretrained(tmp_path / "model")
    names: dict[str, Any] = {
        "GRPOTrainer": GRPOTrainer,
        "model": str(tmp_path / "model"),
        "reward": tiny_trl.even_words,
        "dataset": tiny_trl.rows(),
        "args": tiny_trl.arguments(tmp_path, max_steps=2),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert counts(names["trainer"].histories.normalizer) == 2 * 8


def test_another_version_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "version", lambda _: "2.3.0")

    class Other(GRPOTrainer):
        pass

    with pytest.warns(UserWarning, match=r"tested with trl from 1.16.0 .* this is 2.3.0"):
        personalize(Other)
