"""The page's own unit tests (vitest), so that one run of pytest sees all."""

import subprocess

from tests.web.conftest import NODE, WEB


def test_the_units_pass(packages):
    vitest = [NODE, "node_modules/vitest/vitest.mjs", "run", "--no-color"]
    done = subprocess.run(vitest, cwd=WEB, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
