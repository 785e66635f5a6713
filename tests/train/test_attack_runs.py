"""Trainings to which something happens at any moment: see `support.attack_runs`, which `make attack` runs 300 times."""

import random

import pytest

pytest.importorskip("deepspeed")
from support.attack_runs import Campaign, table


def test_a_few_faults_of_a_training_with_loader_workers(tmp_path):
    campaign = Campaign(tmp_path, random.Random(7), shapes=["with loader workers"])
    campaign.run(3)
    assert "| all | 3 |" in table(campaign.met)
