"""Files that try to take the machine down, or that no config is: one ConfigError, and soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlft.config.run import Config
from rlft.errors import ConfigError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
HOSTILE = {
    "deep.toml": "a = " + "[" * 5000 + "]" * 5000,
    "deep.yaml": "a: " + "[" * 20000 + "]" * 20000,
    "rather_deep.yaml": "a: " + "[" * 40 + "]" * 40,
    "laughs.yaml": LAUGHS,
    "itself.yaml": "a: &a [*a]\n",
    "itself_as_table.yaml": "optim: &a {b: *a}\n",
    "date.yaml": "steps: 2020-13-45\n",
    "date.toml": "steps = 2020-13-45\n",
    "real_date.toml": 'model = "m"\ndata = "d"\nout = "o"\nsteps = 2020-12-24\n',
    "huge.toml": "steps = 1" + "0" * 5000 + "\n",
    "huge.yaml": "steps: 1" + "0" * 5000 + "\n",
    "large.toml": 'model = "m"\ndata = "d"\nout = "o"\nsteps = 1' + "0" * 300 + "\n",
    "infinite.toml": 'model = "m"\ndata = "d"\nout = "o"\nsteps = 1\noptim = {lr = inf}\n',
    "keys.yaml": "1: 2\nnull: 3\n",
    "list.yaml": "- 1\n- 2\n",
    "object.yaml": "model: !!python/object/apply:os.system ['true']\n",
    "long.toml": "# " + "x" * 2**21,
    "wide.yaml": "a: [" + "1, " * 20000 + "1]\n",
    "nothing.yaml": "",
    "latin.toml": b'model = "\xe9"',
    "null.toml": b"model = \x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_error(name: str, tmp_path: Path) -> None:
    content = HOSTILE[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        Config.load(tmp_path / name)
    assert time.process_time() - began < 20  # what grows without bounds takes minutes or all memory
    assert len(str(error.value)) < 2000
