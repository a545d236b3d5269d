"""Training of the tiny pipeline: labels of words, positions, the VAE, and several processes."""

from unittest.mock import Mock, call

import pytest
import torch

from lineardit.examples.tiny_flux import scenes
from lineardit.examples.tiny_flux.flow import image_positions
from lineardit.examples.tiny_flux.model import build_vae
from lineardit.examples.tiny_flux.train import join_processes
from lineardit.examples.tiny_flux.train_text import LABELS, label_tensor, words_and_objects
from lineardit.examples.tiny_flux.train_vae import object_masks, refine


def test_words_and_objects_label_every_word_with_its_object():
    captions, labels = words_and_objects(0, 40)
    for caption, row in zip(captions, labels, strict=True):
        objects = {(item.colour, item.shape, item.cell): item for item in scenes.parse(caption).objects}
        labelled = [item and tuple(names[i] for names, i in zip(LABELS, item, strict=True)) for item in row]
        words = caption.split()
        for item in objects:
            phrase = " ".join(word for word, label in zip(words, labelled, strict=False) if label == item)
            assert phrase == objects[item].phrase
        others = [word for word, label in zip(words, labelled, strict=False) if label is None] + words[len(labelled) :]
        assert " ".join(others).startswith("and on" if len(objects) == 2 else "on")


def test_label_tensor_ignores_words_without_an_object():
    out = label_tensor([[(1, 2, 3), None]], 3)
    assert out.tolist() == [[[1, 2, 3], [-100] * 3, [-100] * 3]]


@pytest.mark.parametrize("stride, expected", [(1, [0.0, 1.0, 2.0]), (2, [0.5, 2.5, 4.5])])
def test_image_positions_are_the_centres_of_the_tokens_they_replace(stride, expected):
    positions = image_positions(2, 3, stride)
    assert positions[:3, 2].tolist() == expected
    assert positions[:, 1].tolist() == [expected[0]] * 3 + [expected[1]] * 3
    assert torch.equal(positions[:, 0], torch.zeros(6))


def test_refine_trains_only_the_decoder():
    vae = build_vae()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    refine(vae, steps=2, batch=1)
    changed = {name.split(".")[0] for name, weight in vae.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"decoder"}
    assert all(weight.requires_grad for weight in vae.parameters())


def test_object_masks_cover_objects_and_their_shadows():
    masks = object_masks(5, 3, 96, 64)
    assert masks.shape == (3, 1, 64, 96)
    for index in range(3):
        scene = scenes.sample(5 + index)
        share = masks[index].mean() / len(scene.objects)
        assert 0.02 < share < 0.1  # a disc of radius 0.095 is 2.8% of a square; its shadow as much again


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_join_gives_each_process_its_own_gpu(device: str, monkeypatch: pytest.MonkeyPatch):
    called = Mock()
    monkeypatch.setattr("torch.cuda.set_device", called.set_device)
    monkeypatch.setattr("torch.distributed.init_process_group", called.init_process_group)
    join_processes(device)
    assert called.mock_calls == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    join_processes(device)
    assert called.mock_calls == [*([call.set_device(1)] if device == "cuda" else []), call.init_process_group()]
