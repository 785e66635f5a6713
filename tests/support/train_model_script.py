"""A real model on two ranks whose batches train different heads: `python train_model_script.py real OUT`."""

import dataclasses

import torch

import ejmp
from ejmp.data.embedded import demo
from ejmp.data.sampling.batch import make_batch
from ejmp.graph.settings import GraphSettings
from ejmp.train.config import TrainConfig
from ejmp.train.engine import Engine
from ejmp.train.groups import scale_shared_gradients
from ejmp.train.objective import Supervised
from ejmp.train.task import Task, Tasks
from support import train_script

STEPS = 3
KINDS = ("direct", "gradient", "fp16")
SETS = ("oc20", "ani1x")


def model_of(kind):
    sizes = {name: 8 for name in vars(ejmp.jmp_s()) if name.startswith("emb_size")}
    config = dataclasses.replace(ejmp.jmp_s(blocks=1), num_tasks=2, direct_forces=kind != "gradient", **sizes)
    torch.manual_seed(0)
    return ejmp.JMP(config, backend="reference", precision="fp16" if kind == "fp16" else "fp32")


def objective_of(model, kind):
    forces = "gradient" if kind == "gradient" else "direct"
    rows = [Task.from_info(demo(name).info, head=h, forces=forces) for h, name in enumerate(SETS)]
    return Supervised(model, Tasks(rows))


def batch_of(step, rank):
    """Return two structures of the rank's dataset."""
    data = demo(SETS[rank])
    structures = [data[2 * step + i] for i in range(2)]
    return make_batch(structures, [rank, rank], settings=GraphSettings(cutoff=4.0, max_neighbors=6))


def groups(model):
    return [{"name": "all", "params": list(model.parameters()), "lr": 1e-3, "lr_factor": 1.0, "weight_decay": 0.0}]


def real(ranks):
    seen = {}
    for kind in KINDS:
        for stage in (0, 1, 2):
            model = model_of(kind)
            scale_shared_gradients(model)
            config = TrainConfig(zero_stage=stage, precision="fp16" if kind == "fp16" else "fp32")
            engine = Engine(objective_of(model, kind), groups(model), config, ranks)
            taken = [engine.step(batch_of(step, ranks.rank)) for step in range(STEPS)]
            while kind == "fp16" and taken[-1].skipped:
                taken.append(engine.step(batch_of(STEPS - 1, ranks.rank)))
            seen[f"{kind}{stage}"] = [[r.loss, r.grad_norm, r.skipped] for r in taken]
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_script.main({"real": real})
