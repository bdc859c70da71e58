"""Training: steps, resumption, several workers, and what happens when a loss turns NaN."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gfl.checkpoint.files import CHECKSUMS, TRAINING, read_about, require_whole
from gfl.checkpoint.snapshot import load_checkpoint
from gfl.config.loader import derive
from gfl.data.dataset import collate
from gfl.data.split import load_splits
from gfl.errors import NonFiniteLossError, PreemptedError
from gfl.model.criterion import loss_names
from gfl.train.engine import FitOptions, fit
from gfl.train.microbatch import first_non_finite, micro_batches
from gfl.train.optimizer import build_optimizer, lr_factor, scaled_lr
from gfl.train.trainer import Start, Trainer
from tests.support.processes import run_workers

CPU = torch.device("cpu")


class Recorder:
    """Keeps every report, and a checkpoint of every epoch."""

    def __init__(self, folder, stop_after=None, stop_after_step=None):
        self.stop_after_step = stop_after_step
        self.folder = folder
        self.stop_after = stop_after
        self.steps = []
        self.epochs = []

    def on_steps(self, report):
        self.steps.append(report)

    def on_checkpoint(self, report):
        folder = self.folder / f"step-{report.step}"
        folder.mkdir(parents=True)
        report.snapshot().write(folder)
        if report.step == self.stop_after_step:
            raise KeyboardInterrupt

    def on_epoch(self, report):
        self.epochs.append(report)
        folder = self.folder / f"epoch-{report.epoch}"
        folder.mkdir(parents=True)
        report.snapshot().write(folder)
        if report.epoch == self.stop_after:
            raise KeyboardInterrupt


def train(config, recorder, resume=None, **options):
    how = {"start": Start(resume=resume), "report_every": 2, **options}
    options = FitOptions(CPU, recorder.folder / "bad", **how)
    return fit(config, load_splits(config), recorder, options)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The trainer and the recorder of a training of three epochs that nothing interrupted."""
    recorder = Recorder(tmp_path_factory.mktemp("whole"))
    return train(tiny, recorder), recorder


def test_a_fit_reports_steps_epochs_and_checkpoints(tiny, whole):
    trainer, recorder = whole
    assert trainer.step == recorder.steps[-1].total_steps == 3 * trainer.batches.steps_per_epoch
    assert [r.epoch for r in recorder.epochs] == [1, 2, 3]
    last = recorder.steps[-1]
    assert last.metrics["loss"] == pytest.approx(
        sum(last.metrics[name] for name in loss_names(tiny.model))
    )
    assert last.metrics["loss"] < recorder.steps[0].metrics["loss"]
    assert {"lr", "grad_norm", "images_per_second"} < set(last.metrics)
    times = [last.metrics[f"step_ms_p{percent}"] for percent in (50, 90, 99)]
    assert 0 < times[0] <= times[1] <= times[2]
    assert 0 < last.metrics["data_wait_share"] < 1
    assert last.metrics["worker0.data_wait_share"] == last.metrics["data_wait_share"]
    assert 0.1 < last.metrics["worker0.memory_gib"] < 99
    detector, about = load_checkpoint(recorder.folder / "epoch-3")
    assert about.classes == ["rectangle", "ellipse", "triangle"]
    assert (about.step, about.epoch) == (trainer.step, 3)
    assert about.metrics == recorder.epochs[-1].metrics
    for key, value in trainer.detector.state_dict().items():
        assert torch.equal(value, detector.state_dict()[key])


def require_same_state(one, other):
    """Compare the weights, their average and the state of the optimizer of two trainers."""
    for first, second in ((one.detector, other.detector), (one.model, other.model)):
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key
    states = zip(one.optimizer.state.values(), other.optimizer.state.values(), strict=True)
    for first, second in states:
        for key, value in first.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[key])), key


def test_resumed_with_adamw_equals_uninterrupted_bit_for_bit(tiny, whole, tmp_path):
    trainer, recorder = whole
    rest = Recorder(tmp_path)
    resumed = train(tiny, rest, resume=recorder.folder / "epoch-1")
    assert [r.epoch for r in rest.epochs] == [2, 3]
    require_same_state(trainer, resumed)


def test_resumed_with_sgd_and_an_average_equals_uninterrupted_bit_for_bit(tiny, tmp_path):
    config = derive(type(tiny), tiny, ["optim.name=sgd", "optim.ema=0.9", "schedule.epochs=2"])
    uninterrupted = train(config, Recorder(tmp_path / "whole"))
    interrupted = Recorder(tmp_path / "part", stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupted)
    rest = Recorder(tmp_path / "rest")
    resumed = train(config, rest, resume=tmp_path / "part" / "epoch-1")
    assert [r.epoch for r in rest.epochs] == [2]
    require_same_state(uninterrupted, resumed)


def test_resumed_within_an_epoch_equals_uninterrupted_bit_for_bit(tiny, tmp_path):
    config = derive(type(tiny), tiny, ["optim.ema=0.9", "schedule.epochs=2"])
    calm = Recorder(tmp_path / "whole")
    whole = train(config, calm, checkpoint_every=3)
    stop = whole.batches.steps_per_epoch // 3 * 3
    assert 0 < stop < whole.batches.steps_per_epoch
    interrupted = Recorder(tmp_path / "part", stop_after_step=stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupted, checkpoint_every=3)
    rest = Recorder(tmp_path / "rest")
    resumed = train(config, rest, checkpoint_every=3, resume=tmp_path / "part" / f"step-{stop}")
    require_same_state(whole, resumed)
    together = [report.step for report in [*interrupted.steps, *rest.steps]]
    assert together == [report.step for report in calm.steps]
    assert rest.epochs[-1].metrics == calm.epochs[-1].metrics


def stop_at_the_third_report(rank, config, folder):
    torch.set_num_threads(1)
    recorder = Recorder(folder / str(rank))
    asked = []

    def should_stop():
        asked.append(rank)
        return rank == 1 and len(asked) == 3

    try:
        train(config, recorder, should_stop=should_stop)
    except PreemptedError as error:
        return str(error), [path.name for path in recorder.folder.glob("*")]


def test_all_workers_stop_with_a_checkpoint_if_one_is_preempted(tiny, tmp_path):
    config = derive(type(tiny), tiny, ["data.repeat=3"])
    first, second = run_workers(2, stop_at_the_third_report, config, tmp_path)
    assert first == second == ("preempted after step 6, whose checkpoint is stored", ["step-6"])


def test_a_snapshot_is_of_its_moment(tiny, tmp_path):
    trainer = Trainer(tiny, load_splits(tiny)[0], CPU)
    trainer.parallel.train()
    keys = next(iter(trainer.batches))
    batch = collate([trainer.dataset[key] for key in keys])
    trainer.train_step(batch)
    before = {key: value.clone() for key, value in trainer.detector.state_dict().items()}
    snapshot = trainer.snapshot(trainer.train_split, {})
    trainer.train_step(batch)
    snapshot.write(tmp_path)
    for key, value in load_checkpoint(tmp_path)[0].state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_finished_training_resumes_to_nothing(tiny, whole, tmp_path):
    again = Recorder(tmp_path)
    trainer = train(tiny, again, resume=whole[1].folder / "epoch-3")
    assert again.steps == again.epochs == []
    assert trainer.epochs_done == 3


def steps(rank, config, count, shards=None):
    torch.set_num_threads(1)
    trainer = Trainer(config, load_splits(config)[0], CPU, Start(shards=shards))
    trainer.parallel.train()
    rows = []
    for step in range(count):
        keys = [trainer.batches.keys(step, shard) for shard in trainer.batches.shards]
        batches = [collate([trainer.dataset[key] for key in of_shard]) for of_shard in keys]
        rows.append(trainer.train_step(*batches))
    return torch.stack(rows), trainer.detector.state_dict()


def test_the_number_of_workers_does_not_change_the_mathematics(tiny):
    config = derive(type(tiny), tiny, ["model.backbone.norm_eval=true", "optim.name=sgd"])
    threads = torch.get_num_threads()
    losses, weights = steps(0, config, 5)
    torch.set_num_threads(threads)
    (first, weights_0), (second, weights_1) = run_workers(2, steps, config, 5)
    torch.testing.assert_close((first + second)[:, :3] / 2, losses[:, :3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[:, 3], losses[:, 3], rtol=1e-4, atol=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(weights_0[key], value, rtol=0, atol=1e-5)
        assert torch.equal(weights_0[key], weights_1[key])


ELASTIC = {
    # Every shard has its own statistics and padding; the statistics of the first are kept.
    "batch norm trains, on images of several sizes": ["data.multi_scale=[48, 96]",
                                                      "data.long_side=96"],
    "shards in micro-batches": ["data.images_per_pass=1", "optim.clip_norm=5.0", "optim.ema=0.9",
                         "model.quality=centerness"],
}  # fmt: skip


def two_steps_each(rank, configs, shards):
    return [steps(rank, config, 2, shards) for config in configs]


def test_missing_workers_change_nothing_but_rounding(tiny):
    """The shards of three workers on three, on two, of which one takes two, and on one."""
    # Adam makes a step of the rounding in a gradient that is next to none.
    common = ["data.batch=6", "optim={name: sgd, lr: 0.01}"]
    configs = [derive(type(tiny), tiny, [*common, *options]) for options in ELASTIC.values()]
    threads = torch.get_num_threads()
    whole = run_workers(3, two_steps_each, configs, None)
    for found in (run_workers(2, two_steps_each, configs, 3), [two_steps_each(0, configs, 3)]):
        for index, name in enumerate(ELASTIC):
            expected, rows = (
                torch.stack([of_worker[index][0] for of_worker in workers]).mean(dim=0)
                for workers in (whole, found)
            )

            def explain(reason, name=name):
                return f"{name}: {reason}"

            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5, msg=explain)
            for key, value in whole[0][index][1].items():
                other = found[0][index][1][key]
                torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=explain)
    torch.set_num_threads(threads)


def states_after_a_resumption(rank, config, shards, folder):
    """Train two epochs and their ends anew, once from a step and once from the end of an epoch."""
    torch.set_num_threads(1)
    split = load_splits(config)[0]

    def train_four_steps(resume=None):
        trainer = Trainer(config, split, CPU, Start(resume=resume, shards=shards))
        trainer.parallel.train()
        for step in range(trainer.step, 4):
            keys = [trainer.batches.keys(step, shard) for shard in trainer.batches.shards]
            trainer.train_step(*(collate([trainer.dataset[k] for k in part]) for part in keys))
            if resume is None and rank == 0:
                checkpoint = folder / str(trainer.step)
                checkpoint.mkdir()
                trainer.snapshot(split, {}).write(checkpoint)
        return trainer

    whole = train_four_steps()
    dist.barrier()  # the checkpoints are written
    assert whole.batches.steps_per_epoch == 3
    for step in (2, 3):
        require_same_state(whole, train_four_steps(resume=folder / str(step)))


@pytest.mark.parametrize(
    ("workers", "shards"), [(3, None), (3, 6), pytest.param(4, None, marks=pytest.mark.slow)]
)
def test_resumed_with_many_workers_equals_uninterrupted_bit_for_bit(
    tiny, tmp_path, workers, shards
):
    # The sum over three or more workers depends on its order, so on DDP's buckets of gradients.
    config = derive(type(tiny), tiny, ["data.batch=12", "schedule.epochs=2"])
    run_workers(workers, states_after_a_resumption, config, shards, tmp_path)


def test_one_worker_in_place_of_two_changes_no_digit(tiny):
    """Halves are exact, and so is the order of two summands."""
    threads = torch.get_num_threads()
    (first, expected), (second, _) = run_workers(2, steps, tiny, 4)
    rows, weights = steps(0, tiny, 4, shards=2)
    torch.set_num_threads(threads)
    assert torch.equal(rows[:, :3], (first + second)[:, :3] / 2)
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key


def test_a_loss_that_turns_nan_stops_training_and_is_explained(tiny, tmp_path):
    config = derive(type(tiny), tiny, ["optim.lr=1e30", "optim.name=sgd", "schedule.name=step",
                                       "schedule.warmup_steps=0"])  # fmt: skip
    recorder = Recorder(tmp_path)
    with pytest.raises(NonFiniteLossError) as caught:
        train(config, recorder)
    message = str(caught.value)
    assert "NaN or infinity, first in output of backbone" in message
    assert ".jpg" in message
    assert str(tmp_path / "bad") in message
    assert "\n" not in message
    assert recorder.epochs == []
    saved = torch.load(tmp_path / "bad" / "batch-rank0.pt", weights_only=True)
    assert saved["pixels"].shape == (8, 3, 64, 64)
    assert all(Path(name).is_file() for name in saved["images"])


def test_weights_stay_those_of_the_step_that_failed(tiny):
    trainer = Trainer(tiny, load_splits(tiny)[0], CPU)
    trainer.parallel.train()
    batches = [collate([trainer.dataset[key] for key in trainer.batches.keys(i)]) for i in range(3)]
    trainer.train_step(batches[0])
    before = {k: v.clone() for k, v in trainer.detector.named_parameters()}
    std = trainer.detector.pixel_std.clone()
    trainer.detector.pixel_std.zero_()  # divides by zero
    trainer.train_step(batches[1])
    trainer.detector.pixel_std.copy_(std)
    trainer.train_step(batches[2])
    assert trainer.first_bad_step.item() == 1
    for key, value in trainer.detector.named_parameters():
        assert torch.equal(value, before[key]), key


def test_the_first_bad_tensor_is_named_wherever_it_is(tiny):
    trainer = Trainer(tiny, load_splits(tiny)[0], CPU)
    batch = collate([trainer.dataset[0, i] for i in range(2)])

    def culprit():
        (micro_batch,) = micro_batches(trainer.loss_module, [batch], None, 1)
        return first_non_finite(trainer.loss_module, micro_batch)

    assert culprit() is None
    scale = trainer.detector.head.scales[0]
    overflow = scale.register_hook(lambda gradient: gradient / 0)
    assert culprit() == "gradient of head.scales.0"
    overflow.remove()
    trainer.detector.fpn.levels.inner_blocks[0][0].weight.data[0, 0] = float("inf")
    assert culprit() == "parameter fpn.levels.inner_blocks.0.0.weight"


def stop_at_nan_of_rank_1(rank, config, folder):
    torch.set_num_threads(1)
    recorder = Recorder(folder / str(rank))
    splits = load_splits(config)
    if rank == 1:
        # Inside all of the image, and as NaN as JSON allows: reading would have dropped it.
        for record in splits[0].records:
            record.boxes[:, 0] = float("nan")
    try:
        fit(config, splits, recorder, FitOptions(CPU, folder / "bad", report_every=1))
    except NonFiniteLossError as error:
        return str(error)


def test_a_nan_on_one_worker_stops_all_with_the_same_words(tiny, tmp_path):
    first, second = run_workers(2, stop_at_nan_of_rank_1, tiny, tmp_path)
    assert first == second
    assert "first in input boxes" in first
    saved = {path.name for path in (tmp_path / "bad").iterdir()}
    assert saved == {"config.yaml", "batch-rank0.pt", "batch-rank1.pt"}


def test_learning_rate_scales_with_the_batch_and_follows_its_schedule(tiny):
    config = derive(type(tiny), tiny, ["data.batch=4", "optim.lr=0.016", "optim.lr_batch=16"])
    assert scaled_lr(config) == pytest.approx(0.004)
    step = derive(
        type(tiny), tiny,
        ["schedule={name: step, epochs: 12, warmup_steps: 500, milestones: [8, 11], gamma: 0.1}"],
    ).schedule  # fmt: skip
    assert lr_factor(0, step, 1000) == pytest.approx(1 / 3)
    assert lr_factor(250, step, 1000) == pytest.approx(2 / 3)
    assert [lr_factor(s, step, 1000) for s in (500, 7999, 8000, 11000)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
    cycle = derive(type(tiny), tiny, ["schedule.name=one_cycle", "schedule.epochs=10"]).schedule
    factors = [lr_factor(s, cycle, 10) for s in range(100)]
    assert factors[0] == pytest.approx(1 / 25)
    assert max(factors) == pytest.approx(1, abs=1e-3)
    assert factors[-1] == pytest.approx(1e-5)


def test_biases_of_convolutions_have_their_own_rate_and_decay(tiny):
    config = derive(
        type(tiny), tiny,
        ["optim={name: sgd, lr: 0.1, lr_batch: 8, bias_lr_factor: 2.0, bias_decay_factor: 0.0}"],
    )  # fmt: skip
    trainer = Trainer(config, load_splits(config)[0], CPU)
    others, biases = build_optimizer(trainer.detector, config).param_groups
    assert (others["lr"], biases["lr"]) == (0.1, 0.2)
    assert (others["weight_decay"], biases["weight_decay"]) == (1e-4, 0)
    names = {id(p): n for n, p in trainer.detector.named_parameters()}
    assert all(names[id(p)].endswith(".bias") for p in biases["params"])
    assert not any("tower" in names[id(p)] for p in biases["params"])
    assert len(others["params"]) + len(biases["params"]) == len(names)


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    with pytest.raises(ValueError, match=r"absent: not a checkpoint"):
        read_about(tmp_path / "absent")
    shutil.copytree(whole[1].folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "epoch-1" / "about.json").write_text('{"classes": []}')
    with pytest.raises(ValueError, match=r"about\.json: damaged"):
        load_checkpoint(tmp_path / "epoch-1")
    (tmp_path / "epoch-2" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"weights\.safetensors: damaged \(its SHA-256"):
        load_checkpoint(tmp_path / "epoch-2")
    (tmp_path / "epoch-3" / TRAINING).unlink()
    with pytest.raises(ValueError, match=r"training\.pt: missing; use another checkpoint"):
        require_whole(tmp_path / "epoch-3")
    load_checkpoint(tmp_path / "epoch-3")  # to predict it is not needed
    (tmp_path / "epoch-3" / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"sha256\.json: No such file"):
        require_whole(tmp_path / "epoch-3")
    load_checkpoint(tmp_path / "epoch-3")
