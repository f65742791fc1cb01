"""FSDP2 and AdamW on sharded parameters, in two and in four processes, beside one.

The order of sums is the only difference: see test_distributed_training.py for the bound.
"""

import json

import pytest
import torch

from distributed import cases, launch
from halfbyte.integrations.distributed import load_checkpoint, shard_model
from halfbyte.optim import AdamW8bit, AdamW32bit

ORDER_OF_SUMS = 5e-5


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, measurements) of two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch.run_worker("worker_shards.py", 2, folder)
    return folder, json.loads((folder / "shards.json").read_text())


@pytest.fixture(scope="module")
def four(tmp_path_factory, two):
    """Those of four, which load what two have saved."""
    folder = tmp_path_factory.mktemp("four")
    launch.run_worker("worker_shards.py", 4, folder, two[0])
    return folder, json.loads((folder / "shards.json").read_text())


@pytest.fixture(params=[2, 4])
def found(request, two, four) -> tuple[int, dict]:
    """(processes, measurements)."""
    return request.param, (two if request.param == 2 else four)[1]


@pytest.mark.parametrize("way", ["ddp", "reshard", "stay"])
def test_losses_and_gradients_are_those_of_one_process(found, way):
    measured = found[1][way]
    assert measured["loss"] == pytest.approx(measured["expected_loss"], rel=ORDER_OF_SUMS)
    assert measured["distance"] < ORDER_OF_SUMS


def test_packed_weights_are_cut_by_rows(found):
    processes, sharding = found[0], found[1]["sharding"]
    assert set(sharding["sizes"]) == {"weight", "absmax", "nested_absmax", "nested_offset"}
    for name, size in sharding["sizes"].items():
        parts = [part[name] for part in sharding["parts"]]
        step = -(-size // processes)
        assert parts == [min(step, max(0, size - step * i)) for i in range(processes)]
    assert sharding["sizes"]["absmax"] % processes and sharding["sizes"]["weight"] % processes
    assert sharding["sizes"]["nested_offset"] == 1  # the others' parts are empty


def test_a_process_holds_its_share_of_the_bytes(found):
    processes, sharding = found[0], found[1]["sharding"]
    assert sum(sharding["before"]) == sharding["whole"]
    assert sharding["after"] == sharding["before"]
    # Parameters cut by rows of unequal number: at most one row of each above the share.
    assert max(sharding["before"]) < 1.1 * sharding["whole"] / processes


def test_a_part_is_stepped_like_a_parameter_of_its_own(found):
    """Bit for bit, empty parts and saved and loaded state included."""
    assert len(found[1]["exact"]) == 8 and all(found[1]["exact"].values()), found[1]["exact"]


def test_the_state_dict_says_where_parts_lie(found):
    processes, state = found[0], found[1]["state"]
    assert state["shards"] == processes
    moments, scales = ["exp_avg", "exp_avg_sq"], ["exp_avg_absmax", "exp_avg_sq_absmax"]
    assert sorted(moments + scales) == state["sharded"]
    assert all(state["shapes"][name] == [10, 100] for name in moments)
    blocks = -(-(-(-10 // processes) * 100) // 256)  # of the largest part
    assert all(state["shapes"][name] == [processes * blocks] for name in scales)
    assert f"expected 8-bit state in {processes} shards, got 1" in state["refusal"]


def test_one_process_with_a_bad_gradient_stops_all(found):
    processes, said = found[0], found[1]["nonfinite"]
    assert all(unchanged for _, unchanged in said["raise"] + said["skip"])
    messages = [message for message, _ in said["raise"]]
    assert "gradient is inf at [0, 3]" in messages[-1]
    assert all("in another process's shard" in message for message in messages[:-1])
    assert [message for message, _ in said["skip"]] == ["skipped 1"] * processes


def test_four_processes_go_on_where_two_stopped(two, four):
    expected, others = two[1]["losses"], four[1]["from others"]
    assert others["32bit"] == pytest.approx(expected["32bit"], rel=ORDER_OF_SUMS)
    assert others["8bit adapter"] == pytest.approx(expected["8bit"][:1], rel=ORDER_OF_SUMS)


def test_8bit_state_of_other_parts_is_refused_before_anything_changes(four):
    refusal = four[1]["from others"]["refusal"]
    assert "loads into as many shards as it was written from" in refusal
    assert four[1]["from others"]["unchanged"]


def test_one_process_goes_on_where_two_stopped(two):
    folder, measured = two
    model = cases.decoder()
    params = list(cases.named_trainable(model).values())
    optimizer = AdamW32bit(params, lr=1e-2)
    load_checkpoint(folder / "32bit", model, optimizer)
    losses = []
    for _ in range(2):
        loss = model(cases.batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(measured["losses"]["32bit"], rel=ORDER_OF_SUMS)
    with pytest.raises(ValueError, match="as many shards as it was written from"):
        load_checkpoint(folder / "8bit", model, AdamW8bit(params, min_8bit_size=0))


def test_a_checkpoint_of_another_model_is_refused(two):
    with pytest.raises(ValueError, match=r"expected an entry model\.weight, found none"):
        load_checkpoint(two[0] / "32bit", torch.nn.Linear(3, 3))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="expected decoder layers in Linear, found none"):
        shard_model(torch.nn.Linear(3, 3))


def test_trainable_parameters_of_two_dtypes_are_refused():
    model = cases.decoder()
    model.blocks[0].up.lora_a.data = model.blocks[0].up.lora_a.data.bfloat16()
    with pytest.raises(ValueError, match=r"one dtype in Block, got torch.bfloat16 \(up.lora_a\)"):
        shard_model(model)
