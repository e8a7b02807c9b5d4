"""A small study: two tables on the embedded digits, of trainings that take a second or two."""

import copy

import pytest
import torch
import yaml
from study_plans import PLAN


@pytest.fixture
def planned(project, monkeypatch):
    """Writes a plan into the project of the test, changed by a function; returns its tables."""
    import lowbit
    from lowbit_suite.study import plan

    def write(change=lambda tree: None):
        tree = copy.deepcopy(PLAN)
        path = project.folder / "vit.safetensors"
        if not path.exists():
            torch.manual_seed(0)
            vit = lowbit.models.create("vit_nano", 10, 1, 8, depth=1)
            with torch.no_grad():  # a fresh network attends evenly, and two bits round an even softmax to zero
                vit.blocks[0].attn.qkv.weight.mul_(30)
            lowbit.save(vit, path)
        for part in ("model", "teacher"):
            tree["ofq"]["run"][part]["pretrained"] = str(path)
        change(tree)
        (project.notebooks / plan.FILE).write_text(yaml.safe_dump(tree, sort_keys=False))
        return plan.load()

    monkeypatch.setenv("LOWBIT_CACHE", str(project.folder / "cache"))
    return write
