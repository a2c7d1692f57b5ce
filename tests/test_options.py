"The options of every command and their defaults, as tests/options.json lists them. `python tests/test_options.py` writes the file again."
import argparse
import json
import re
from pathlib import Path

from gac.cli import COMMANDS, parser

FILE = Path(__file__).with_name('options.json')

def subparser(name:str) -> argparse.ArgumentParser: # name: e.g. data convert
    "Return the parser of a command."
    p = parser()
    for word in name.split(): p = next(a for a in p._actions if a.choices and word in a.choices).choices[word]
    return p

def described(p:argparse.ArgumentParser, a:argparse.Action) -> str:
    "Return what --help says of an option: required or not, default, choices."
    shown = re.search(r'\(default: (.*)\)$', p._get_formatter()._expand_help(a))
    default = shown[1] if shown else '' if a.default in (None, False, [], ()) else str(a.default)
    words = ['required'*bool(a.required and a.option_strings), default, '{' + ', '.join(map(str, a.choices)) + '}' if a.choices else '']
    return ' '.join(filter(None, words))

def current() -> dict: # command -> names of an option -> description
    "Return the options of every command."
    found = {}
    for name in COMMANDS:
        p = subparser(name)
        found[name] = {', '.join(a.option_strings) or a.dest: described(p, a) for a in p._actions if a.dest != 'help'}
    return found

def test_options_and_defaults_are_those_of_the_list():
    expected, got = json.loads(FILE.read_text(encoding='utf-8')), current()
    assert set(got) == set(expected)
    for name, options in expected.items(): assert got[name] == options, f'gac {name}'

if __name__ == '__main__':
    FILE.write_text(json.dumps(current(), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
