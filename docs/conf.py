"Settings of the documentation site; its sources are gathered by collect.py."
from configparser import ConfigParser
from pathlib import Path

from docutils.utils.math import latex2mathml

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
settings = ini['DEFAULT']

project, author, release, language = 'GAC', settings['author'], settings['version'], 'en'
copyright = settings['copyright']
extensions = ['myst_nb']

myst_enable_extensions = ['dollarmath', 'deflist']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # the outputs are those of the files
nb_merge_streams = True
nitpicky = True
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = 'hide'

html_theme, html_title, html_static_path = 'furo', 'GAC', ['static']
html_css_files = ['site.css']
html_copy_source = False

def mathml(tex:str, block:bool) -> str:
    "Write a formula as MathML, which browsers draw without a script."
    try: return latex2mathml.tex2mathml(tex, as_block=block)
    except Exception: return f'<code>{tex}</code>'  # a formula docutils cannot read stays readable

def setup(app):
    from docutils import nodes
    def visit(block):
        def write(self, node):
            self.body.append(mathml(node.astext(), block))
            raise nodes.SkipNode
        return write, None
    app.add_html_math_renderer('mathml', visit(False), visit(True))

html_math_renderer = 'mathml'
