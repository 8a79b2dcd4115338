"""The tasks of ``python -m bench frameworks``: fastll and each framework's own functions agree."""

import numpy as np
import pytest

adapters = pytest.importorskip("bench.adapters", reason="the benchmark's packages are not installed")
from bench import frameworks  # noqa: E402


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", adapters.FRAMEWORKS)
def test_tasks(monkeypatch, name):
    """In small, without torch.compile."""
    missing = adapters.why_not(name)
    if missing:
        pytest.skip(missing)
    shapes = {"LARGE": (8, 50), "SMALL": (5, 7), "SHORT": (20, 3), "MANY": (50,)}
    for constant, shape in shapes.items():
        monkeypatch.setattr(adapters, constant, shape)
    monkeypatch.setattr(adapters, "QUICK_SHAPES", tuple(shapes.values())[:3])
    monkeypatch.setattr(adapters, "QUICK_STEPS", 20)
    tasks = list(adapters.FRAMEWORKS[name](True))
    assert len({task.name for task in tasks}) == len(tasks)
    for task in tasks:
        made = task.make()
        result = made.call()
        assert set(task.targets) <= set(made.rivals) | {"torch.compile"}
        reports = frameworks._reports(task, result, made.rivals)
        for rival, told in reports.items():
            assert told.get("agrees"), (task.name, rival, told)
        parts = result if isinstance(result, tuple) else (result,)
        assert all(np.size(part) for part in parts)
