"Measures the house: lengths of modules, functions and cells, parameters, docstrings, and definitions without an example. `python docs/house.py`"
import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# first words of a docstring that states no action
NO_VERB = re.compile(r'(What|Where|Whether|How|One|Every|All|A|An|The|No|Some|Which|Who|It|That|Those|These)\b')

def spread(values:list) -> str: # numbers
    "Return median, 90th percentile and maximum as text."
    values = sorted(values)
    return f'{statistics.median(values):g}, {values[int(.9*(len(values) - 1))]:g}, {values[-1]:g}'

def share(part:int, whole:int) -> str: return f'{part} of {whole} ({part/max(whole, 1):.1%})'

def modules() -> dict[str, str]: # name -> source
    "Return the exported modules."
    return {'.'.join(p.relative_to(ROOT/'gac').with_suffix('').parts): p.read_text(encoding='utf-8') for p in sorted((ROOT/'gac').rglob('[!_]*.py'))}

def of_modules() -> dict[str, str]: # measure -> value
    "Measure the modules and their functions."
    sources = modules()
    trees = {name: ast.parse(text) for name, text in sources.items()}
    public = {name: [n for n in t.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')] for name, t in trees.items()}
    functions = [n for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.FunctionDef)]
    count = lambda f: len([a for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs] if a.arg not in ('self', 'cls')])
    lines = [l for text in sources.values() for l in text.splitlines()]
    told = [n for ns in public.values() for n in ns if isinstance(n, ast.FunctionDef)]
    docs = [ast.get_docstring(n) or '' for n in told]
    return {'modules': str(len(sources)), 'lines of a module (median, 90 %, max)': spread([len(s.splitlines()) for s in sources.values()]),
            'public definitions of a module': spread([len(ns) for ns in public.values()]),
            'lines of a function': spread([f.end_lineno - f.lineno + 1 for f in functions]), 'parameters of a function': spread([count(f) for f in functions]),
            'functions of more than 12 parameters': share(sum(count(f) > 12 for f in functions), len(functions)),
            'lines over 120 columns': share(sum(len(l) > 120 for l in lines), len(lines)),
            'public functions with a docstring': share(sum(map(bool, docs)), len(docs)),
            'docstrings that begin with no verb': share(sum(bool(NO_VERB.match(d)) for d in docs), len(docs))}

def of_notebooks() -> dict[str, str]: # measure -> value
    "Measure the cells, and the definitions no example of their own notebook names."
    cells, exported, definitions, lacking, study = [], [], 0, 0, []
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        code = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        is_library = lambda s: bool(re.search(r'(?m)^#\|\s*(export|default_exp)', s))
        shown = '\n'.join(s for s in code if not is_library(s))
        cells += [len(s.splitlines()) for s in code]
        if re.match(r'\d\d_', path.name): study.append(sum(len(s.splitlines()) for s in code if re.search(r'(?m)^#\|\s*export', s)))
        for s in code:
            if not re.search(r'(?m)^#\|\s*export', s): continue
            exported.append(len(s.splitlines()))
            names = [n.name for n in ast.parse(s).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]
            definitions += len(names)
            lacking += sum(not re.search(rf'\b{n}\b', shown) for n in names)
    return {'lines of a code cell': spread(cells), 'lines of an exported cell': spread(exported), 'exported lines of a notebook of the study': spread(study),
            'public definitions without an example in their notebook': share(lacking, definitions)}

if __name__ == '__main__':
    for name, value in (of_modules() | of_notebooks()).items(): print(f'{name:56} {value}')
