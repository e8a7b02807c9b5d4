"""A small study: two tables on the embedded digits, of trainings that take a second or two."""

import copy

import pytest
import yaml

PLAN = {
    "ofq": {
        "title": "a vision transformer",
        "claims": ["O1"],
        "run": {
            "model": {"name": "vit_nano", "depth": 1, "pretrained": "PATH"},
            "teacher": {"name": "vit_nano", "depth": 1, "pretrained": "PATH"},
            "data": {"name": "digits", "subset": {"train": 256, "test": 64}},
            "train": {"batch_size": 64, "optimizer": "adamw", "lr": 5e-4, "augment": "shift", "crops": 2},
        },
        "epochs": [1, 2],
        "seeds": [0, 1],
        "arms": {
            "full precision": {"bits": [32]},
            "StatsQ + QKR": {
                "bits": [2],
                "quant": {
                    "weight": {"method": "statsq"},
                    "activation": {"method": "lsq", "bits": "same", "bias": True},
                    "first_last": 8,
                    "attention": True,
                    "qkr": True,
                },
                "phases": [
                    {"arm": "CGA", "epochs": 1, "lr": 1e-5, "boundary": 0.05},
                    {"arm": "no mask", "epochs": 1, "lr": 1e-5},
                ],
            },
        },
    },
    "shift": {
        "title": "shift networks",
        "claims": ["D1"],
        "run": {
            "model": {"name": "resnet8"},
            "data": {"name": "digits", "subset": {"train": 256, "test": 64}},
            "train": {"batch_size": 64, "optimizer": "sgd", "lr": 0.1, "augment": "shift"},
        },
        "epochs": [1, 2],
        "seeds": [0, 1],
        "grid": {"method": "pot", "bits": 3},
        "arms": {
            "full precision": {"bits": [32]},
            "DenseShift": {"bits": [3, 2], "quant": {"weight": {"method": "denseshift"}}},
            "S3": {"bits": [3], "quant": {"weight": {"method": "s3"}}, "epochs": [2], "rank": 1},
        },
    },
}


@pytest.fixture
def planned(project, monkeypatch):
    """Writes a plan into the project of the test, changed by a function; returns its tables."""
    import lowbit
    from lowbit.suite.study import plan

    def write(change=lambda tree: None):
        tree = copy.deepcopy(PLAN)
        path = project.folder / "vit.safetensors"
        if not path.exists():
            lowbit.save(lowbit.models.create("vit_nano", 10, 1, 8, depth=1), path)
        for part in ("model", "teacher"):
            tree["ofq"]["run"][part]["pretrained"] = str(path)
        change(tree)
        (project.notebooks / plan.FILE).write_text(yaml.safe_dump(tree, sort_keys=False))
        return plan.load()

    monkeypatch.setenv("LOWBIT_CACHE", str(project.folder / "cache"))
    return write
