"Collect the sources of the documentation, and generate pages from modules, options and tables."
import ast
import io
import json
import os
import re
import shutil
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# ---- notebooks

def clean(notebook:dict) -> dict:
    "Return a notebook without nbdev's directives, hidden cells and hidden inputs."
    kept = []
    for cell in notebook['cells']:
        source, tags = ''.join(cell['source']), cell['metadata'].get('tags', [])
        if re.search(r'(?m)^#\|\s*(hide|default_exp)', source) or 'hide' in tags: continue
        cell['source'] = re.sub(r'(?m)^#\|.*\n?', '', source)
        if 'hide_input' in tags: tags.append('remove-input')
        if cell['source'].strip(): kept.append(cell)
    notebook['metadata']['language_info'] = {'name': 'python', 'pygments_lexer': 'ipython3'}
    return dict(notebook, cells=kept)

def copy_notebook(path:Path, to:Path, dest:Path) -> None: # dest: root of the sources
    "Write a cleaned copy of a notebook whose links hold at its new place."
    to.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(clean(json.loads(path.read_text(encoding='utf-8'))))
    home = os.path.relpath(dest, to.parent)
    text = text.replace('](../docs/', f']({home}/').replace('](lib/', f']({home}/nbs/lib/')
    to.write_text(text, encoding='utf-8')

def notebooks() -> list[Path]:
    "Return the notebooks of the study and of the library."
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

# ---- modules

def plain(text:str) -> str:
    "Escape the text of a comment for a cell of a Markdown table."
    parts = re.split(r'(`[^`]*`)', ' '.join(text.split()))
    parts = [p if i % 2 else re.sub(r'([\\*_\[\]<>$~#])', r'\\\1', p) for i, p in enumerate(parts)]
    return ''.join(parts).replace('|', r'\|')

def code(text:str) -> str: return f'`{text}`'.replace('|', r'\|') if text else ''

def module_file(name:str) -> Path: return ROOT/'gac'/f'{name.replace(".", "/")}.py' # name: e.g. tiles, data.raster

class Module:
    "The source of a module: definitions, comments by line."
    def __init__(self, name:str):
        self.name, self.source = name, module_file(name).read_text(encoding='utf-8')
        self.tree = ast.parse(self.source)
        found = [t for t in tokenize.generate_tokens(io.StringIO(self.source).readline) if t.type == tokenize.COMMENT]
        self.comments = {t.start[0]: t.string.lstrip('# ') for t in found}
        self.above = {t.start[0] + 1: t.string.lstrip('# ') for t in found if t.line.lstrip().startswith('#')}
        named = [n for n in self.tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__']
        self.public = set(ast.literal_eval(named[0].value)) if named else set()

    # (name, type, default, comment) of each parameter, and of what is returned
    def docments(self, f:ast.FunctionDef) -> list[tuple]:
        "Read a signature as fastcore.docments does, without importing the module."
        a, first = f.args, f.body[0].lineno
        names = [*a.posonlyargs, *a.args]
        given = [None]*(len(names) - len(a.defaults)) + a.defaults
        every = [*zip(names, given), *([(a.vararg, None)] if a.vararg else []), *zip(a.kwonlyargs, a.kw_defaults),
                 *([(a.kwarg, None)] if a.kwarg else [])]
        star = {id(a.vararg): '*', id(a.kwarg): '**'}
        said = lambda node: ast.unparse(node) if node is not None else ''
        # a comment belongs to the last parameter of its line
        last = {x.lineno: x.arg for x, _ in every if x.lineno != f.lineno}
        rows = [(star.get(id(x), '') + x.arg, said(x.annotation), said(d), self.comments.get(x.lineno, '')
                 if last.get(x.lineno) == x.arg else '')
                for x, d in every if x.arg not in ('self', 'cls')]
        end = max([f.lineno, *last])
        tail = [self.comments[n] for n in ([f.lineno] if end == f.lineno else range(end + 1, first))
                if n in self.comments]
        return [*rows, ('returns', said(f.returns), '', tail[0] if tail else '')]

def signature(rows:list[tuple]) -> str:
    "Join names and short defaults; the table has the types."
    return ', '.join(n + (f'={d if len(d) <= 24 else "..."}' if d else '') for n, _, d, _ in rows[:-1])

def table(rows:list[tuple]) -> str:
    "Return the parameters as a Markdown table; nothing where none has a type, a default or a comment."
    rows = [r for r in rows if r[1] or r[2] or r[3]]
    if not rows: return ''
    head = '| parameter | type | default | meaning |\n|---|---|---|---|\n'
    return head + '\n'.join(f'| {f"*{n}*" if n == "returns" else code(n)} | {code(t)} | {code(" ".join(d.split()))} | '
                            f'{plain(c)} |' for n, t, d, c in rows)

def directive(kind:str, head:str, *body:str, level:int=4) -> str:
    "Return an object of the Python domain."
    ticks = '`'*level
    return '\n\n'.join([f'{ticks}{{py:{kind}}} {head}', *filter(None, body), ticks])

def doc(node) -> str: return plain(ast.get_docstring(node) or '').replace(r'\|', '|')

def function(m:Module, f:ast.FunctionDef, kind:str='function', level:int=4) -> str:
    "Return a function with its docstring and parameters."
    rows = m.docments(f)
    return directive(kind, f'{f.name}({signature(rows)})', doc(f), table(rows), level=level)

def klass(m:Module, c:ast.ClassDef) -> str:
    "Return a class with its fields and its documented methods, patched ones included."
    marks = [ast.unparse(d).split('(')[0] for d in c.decorator_list]
    init = next((n for n in c.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    fields = [(n.target.id, ast.unparse(n.annotation), ast.unparse(n.value) if n.value else '',
               m.comments.get(n.lineno) or m.above.get(n.lineno, ''))
              for n in c.body if isinstance(n, ast.AnnAssign)] if 'dataclass' in marks else []
    rows = [*(fields or (m.docments(init)[:-1] if init else [])), ('returns', '', '', '')]
    patched = [n for n in m.tree.body if isinstance(n, ast.FunctionDef) and n.args.args
               and getattr(n.args.args[0].annotation, 'id', '') == c.name
               and any(ast.unparse(d) == 'patch' for d in n.decorator_list)]
    own = [n for n in [*c.body, *patched] if isinstance(n, ast.FunctionDef) and not n.name.startswith('_')
           and ast.get_docstring(n)]
    methods = [function(m, n, 'method') for n in own if not any('property' in ast.unparse(d) for d in n.decorator_list)]
    return directive('class', f'{c.name}({signature(rows)})', doc(c), table(rows), *methods, level=5)

def constant(m:Module, n:ast.Assign, names:list[str]) -> str:
    "Return a constant with its value, cut after eight lines."
    lines = ast.get_source_segment(m.source, n).splitlines()
    comment = f'  # {m.comments[n.end_lineno]}' if n.end_lineno in m.comments else ''
    shown = lines[:8] + ['# …'] if len(lines) > 8 else [*lines[:-1], lines[-1] + comment]
    return '\n\n'.join([*(directive('data', name) for name in names[:-1]),
                        directive('data', names[-1], '```python\n' + '\n'.join(shown) + '\n```')])

def notebook_of(name:str) -> str:
    "Return the notebook that a module is exported from."
    line = re.search(r'File to edit: (?:\.\./)+nbs/([\w/]+)\.ipynb', module_file(name).read_text(encoding='utf-8'))
    return line[1]

def api_page(name:str) -> str: # Markdown
    "Return the page of a module."
    m = Module(name)
    public = [n for n in m.tree.body if getattr(n, 'name', '') in m.public]
    names = lambda n: [t.id for t in getattr(n.targets[0], 'elts', n.targets) if isinstance(t, ast.Name)
                       and t.id in m.public]
    constants = [constant(m, n, names(n)) for n in m.tree.body if isinstance(n, ast.Assign) and names(n)]
    notebook = f'[{notebook_of(name)}](../nbs/{notebook_of(name)}.ipynb)'
    parts = [f'# gac.{name}', f'{doc(m.tree)}. {notebook} explains and tests it.',
             f'```{{py:module}} gac.{name}\n```']
    if constants: parts += ['## Constants', *constants]
    for title, kind, write in (('Classes', ast.ClassDef, klass), ('Functions', ast.FunctionDef, function)):
        if found := [write(m, n) for n in public if isinstance(n, kind)]: parts += [f'## {title}', *found]
    return '\n\n'.join(parts) + '\n'

# ---- commands

def commands_page() -> str: # Markdown
    "Return the help of every command as the parser prints it."
    os.environ['COLUMNS'] = '110'
    from gac.cli import COMMANDS, parser
    top = parser()
    parts = ['# Commands', 'What `gac COMMAND --help` prints, command by command. '
             '[Command line](nbs/lib/cli/package.ipynb) has examples.']
    for name in COMMANDS:
        p = top
        for word in name.split(): p = next(a for a in p._actions if a.choices and word in a.choices).choices[word]
        parts += [f'## gac {name}', f'```text\n{p.format_help().strip()}\n```']
    return '\n\n'.join(parts) + '\n'

# ---- reports

def read_table(csv:Path): # DataFrame of strings
    import pandas as pd
    return pd.read_csv(csv, dtype=str, keep_default_na=False)

def html_table(df, caption:str='') -> str:
    "Return a table as the page of a report shows it, by the same template."
    from gac.runner.page import report_template, table_cells
    # one line: a blank line would end the HTML block in Markdown
    wide = report_template('parts.html.j2').module.wide
    return ' '.join(str(wide(table_cells(df), caption)).split('\n'))

def report_pages(folder:Path, dest:Path) -> None:
    "Write the page of a committed report: tables and figures by notebook, and the notebooks as they ran."
    about = json.loads((folder/'provenance.json').read_text(encoding='utf-8'))
    name = folder.relative_to(ROOT).as_posix()
    if (folder/'figures').exists(): shutil.copytree(folder/'figures', dest/name/'figures')
    notebooks = sorted(p for p in (folder/'notebooks').glob('*.ipynb') if not p.name.endswith('.failed.ipynb'))
    for p in notebooks: copy_notebook(p, dest/name/'notebooks'/p.name, dest)
    parts = [f'# Report {name.removeprefix("reports/")}',
             f'Tables and figures as one run wrote them: {about["platform"]}, {about["cores"]} cores, '
             f'{about["device"]}; Python {about["python"]}, '
             f'torch {about["packages"]["torch"]}; {about["time"]}. Data: {about["data"]}.'
             + ' The notebooks as they ran are listed at the end.'*bool(notebooks)]
    for stage, entry in about['notebooks'].items():
        body = [html_table(read_table(folder/'tables'/f'{t}.csv'), f'{t}: {c}') for t, c in entry['tables'].items()
                if (folder/'tables'/f'{t}.csv').exists()]
        body += [f'![{plain(c)}](figures/{f}.png)\n\n*{plain(c)}*' for f, c in entry['figures'].items()
                 if (folder/'figures'/f'{f}.png').exists()]
        body += [f'n/a, {plain(what)}: {plain(why)}' for what, why in entry.get('missing', {}).items()]
        if body: parts += [f'## {stage}', *body]
    if notebooks:
        parts.append('\n'.join(['## The notebooks as they ran', '', '```{toctree}',
                                *(f'notebooks/{p.stem}' for p in notebooks), '```']))
    (dest/name).mkdir(parents=True, exist_ok=True)
    (dest/name/'index.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')

def reports() -> list[Path]:
    "Return the folders of the committed reports."
    return sorted(p.parent for p in (ROOT/'reports').rglob('provenance.json') if 'smoke' not in p.parts)

def claims_page() -> str: # Markdown
    "Return every claim with its verdict, from the tables of the committed reports."
    parts = ['# Claims', 'Every claim of the source documents, with the value measured here and a verdict. '
             '[19_claims](nbs/19_claims.ipynb) writes the table and defines the verdicts; '
             '`gac claims` prints it for any report.']
    tables = [p for p in reports() if (p/'tables'/'claims.csv').exists()]
    for p in tables:
        name, df = p.relative_to(ROOT).as_posix(), read_table(p/'tables'/'claims.csv')
        interval = [f'{m} [{lo}, {hi}]' if lo != 'n/a' else m for m, lo, hi in zip(df.measured, df.lo, df.hi)]
        df = df.assign(claimed=(df.claimed + ' ' + df.unit).str.strip(), measured=interval)
        parts += [f'## {name.removeprefix("reports/").capitalize()}',
                  f'{len(df)} claims, compared with the tables of the [report]({name}/index.md).']
        for about, rows in df.groupby('about', sort=False):
            parts += [f'### {plain(about[0].upper() + about[1:])}',
                      html_table(rows[['claim', 'claimed', 'measured', 'verdict', 'how']])]
    if not tables: parts.append('No committed report holds this table yet; `make study` makes it.')
    return '\n\n'.join(parts) + '\n'

# ---- all of it

def collect(dest:Path) -> None:
    "Write all sources for Sphinx, laid out like the repository so that links between its files hold."
    sys.path.insert(0, str(ROOT))
    from gac.runner.layers import all_modules
    shutil.rmtree(dest, ignore_errors=True)
    shutil.copytree(ROOT/'docs', dest, ignore=shutil.ignore_patterns('*.py', '__pycache__'))
    for name in ('LICENSE', 'CITATION.cff'): shutil.copy(ROOT/name, dest/name)
    (dest/'data').mkdir()
    shutil.copy(ROOT/'data'/'README.md', dest/'data'/'README.md')
    for p in notebooks(): copy_notebook(p, dest/p.relative_to(ROOT), dest)
    for p in reports(): report_pages(p, dest)
    (dest/'api').mkdir()
    for name in all_modules(): (dest/'api'/f'{name}.md').write_text(api_page(name), encoding='utf-8')
    (dest/'commands.md').write_text(commands_page(), encoding='utf-8')
    (dest/'claims.md').write_text(claims_page(), encoding='utf-8')
    entries = [p.relative_to(ROOT).as_posix() + '/index' for p in reports()]
    (dest/'reports.md').write_text('\n'.join(['# Reports', '', 'Results of complete runs.', '', '```{toctree}',
                                              *entries, '```', '']), encoding='utf-8')

if __name__ == '__main__': collect(Path(sys.argv[1]))
