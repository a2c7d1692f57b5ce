"Pins of numerical libraries, and digests by processor."
import json
import os
import subprocess
import sys

import pytest

from gac.core.processor import PINS, SWITCH, instruction_sets
from gac.runner.digests import DIGESTS, KEYS, read_digests, this_processor

pinned = pytest.mark.skipif('avx2' not in instruction_sets(), reason='pins are for x86-64 processors with AVX2')

def run(code, **environ):
    "Return what a new process prints as JSON, without the pins of this one."
    clean = {k: v for k, v in os.environ.items() if k not in (*PINS, 'NPY_DISABLE_CPU_FEATURES', SWITCH)}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=clean | environ, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])

@pinned
def test_importing_gac_pins_libraries_and_a_choice_of_the_user_stays():
    show = 'import gac, json, os; from gac.core.processor import pins_in_force; print(json.dumps(pins_in_force()))'
    here = run(show)
    assert PINS.items() <= here.items() and (here['torch'], here['numpy']) == ('AVX2', 'AVX2')
    assert run(show, MKL_CBWR='AVX2')['MKL_CBWR'] == 'AVX2'
    assert 'MKL_CBWR' not in run(show, **{SWITCH: 'native'})

@pinned
def test_a_command_for_speed_uses_the_whole_processor_and_another_one_does_not():
    show = ('import json, sys; sys.argv = ["gac", {!r}]; import gac.cli.program as p; import gac.cli.options as o; '
            'from gac.core.processor import pins_in_force\n'
            'def {}(): print(json.dumps(pins_in_force()))\n'
            'p.COMMANDS.clear(); {}.__doc__ = "Show."; p.COMMANDS[{!r}] = ({}, ()); p.main()')
    at_speed, study = (run(show.format(name, name, name, name, name)) for name in ('infer', 'study'))
    assert 'MKL_CBWR' not in at_speed and study['MKL_CBWR'] == PINS['MKL_CBWR']

@pinned
def test_this_processor_gives_the_digests_that_are_recorded_for_it():
    "The digests move with every change that moves a digit: then `gac digests --record` renews them."
    mine = run('import gac, json; from gac.runner.digests import measure_digests; print(json.dumps(measure_digests()))',
               OMP_NUM_THREADS='2')
    names = this_processor()
    table = read_digests()
    own = table[(table[KEYS] == [names[k] for k in KEYS]).all(axis=1)]
    if not len(own): pytest.skip(f"{names['processor']} is not recorded: gac digests --record adds it")
    assert {k: own[k].iloc[0] for k in DIGESTS} == mine
