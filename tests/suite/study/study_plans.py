"""Plans of studies on the embedded data, of trainings that take a second or two."""

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
TRANSFER = {
    "title": "from five digits to the others",
    "claims": ["D4"],
    "source": {
        "data": {"name": "digits", "only": ["0", "1", "2", "3", "4"]},
        "train": {"epochs": 1, "batch_size": 64, "optimizer": "sgd", "lr": 0.1},
    },
    "run": {
        "model": {"name": "resnet8"},
        "data": {"name": "digits", "only": ["5", "6", "7", "8"], "subset": {"train": 128, "test": 64}},
        "train": {"batch_size": 64, "optimizer": "sgd", "lr": 0.05},
    },
    "epochs": [1],
    "seeds": [0, 1],
    "cycle": {"data.subset.seed": [7, 9]},
    "arms": {"DenseShift": {"bits": [3], "quant": {"weight": {"method": "denseshift"}}}},
}
DETECTION = {
    "title": "shapes",
    "claims": ["D6"],
    "source": {
        "data": {},  # the test fills it in
        "train": {"epochs": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.1},
    },
    "detector": {"min_size": 32, "channels": 32, "head_convs": 1},
    "run": {
        "model": {"name": "resnet8", "in_chans": 3},
        "data": {"name": "shapes", "subset": {"train": 16, "test": 8}},
        "train": {"batch_size": 8, "optimizer": "sgd", "lr": 0.01},
    },
    "epochs": [1],
    "seeds": [0],
    "arms": {"DenseShift": {"bits": [3], "quant": {"weight": {"method": "denseshift", "init": "project"}}}},
}
TUNE = {
    "claims": ["D3"],
    "arms": ["S3"],
    "factors": [0.5, 1, 2],
    "further": 2,
    "hold_out": 0.25,
    "epochs": 1,
    "seeds": [1000],
    "rank": 5,
}
