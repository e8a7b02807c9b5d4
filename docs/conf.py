"""Sphinx's settings. ``make site`` builds the pages that docs/assemble.py has put together, without importing torch."""

import sys
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.roles import XRefRole
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))
import assemble  # noqa: E402

_about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "lowbit"
copyright = "the lowbit authors, MIT license"
author = "the lowbit authors"
html_title = "lowbit: low-bit training, taught and checked"
language = "en"
smartquotes_action = "qe"  # not dashes: a command in a caption keeps its ``--profile``

extensions = [
    "myst_nb",
    "autoapi.extension",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["_*"]

# The notebooks, as they are stored.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # the widgets' scripts would come from a CDN; their stored text is shown instead
nb_render_markdown_format = "myst"  # as the pages are read; plain CommonMark has no tables, which claims.show prints
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = [
    "autoapi.python_import_resolution",  # packages export lazily; docs/public.py finds where each name is defined
]

# The API, from the source. The pages are made by docs/assemble.py, one for each public module.
autoapi_dirs = [str(ROOT / "lowbit")]
autoapi_root = "_autoapi"
autoapi_generate_api_docs = False
autoapi_add_toctree_entry = False
autoapi_options = ["members", "show-inheritance"]
autoapi_member_order = "bysource"
autoapi_python_class_content = "class"
autodoc_typehints = "signature"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "known"  # single backticks in docstrings: a link if the name is documented, else code

# Everything that a page loads comes from the site itself.
mathjax_path = "mathjax/tex-chtml.js"
html_static_path = [str(DOCS / "static")]

linkcheck_ignore = ["https?://.*"]  # `make links` is about the site's own files

html_theme = "sphinx_book_theme"
html_favicon = "static/favicon.svg"
html_context = {"default_mode": "auto"}  # the reader's system decides between light and dark
html_css_files = ["site.css"]
html_js_files = [("explorables/embed.js", {"type": "module"})]  # wherever a stored output holds an explorable
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "use_download_button": True,
    "home_page_in_toc": False,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],  # the sidebar has the search
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

if _repository := assemble.repository():
    # The branch holds each notebook with a first cell that installs lowbit; .github/workflows/site.yml writes it.
    html_theme_options |= {
        "repository_url": _repository,
        "repository_branch": "launch",
        "path_to_docs": "",
        "use_repository_button": True,
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
    }

_ALIASES = (
    "Count Expected Filter Fraction Gradient Granularity Grid Kind NonNegative Positive Recursion Scale Scores Since "
    "Split Surrogate Task Weight"
)
nitpick_ignore_regex = [
    # Other projects' names: their inventories would have to be fetched.
    ("py:.*", r"(lightning|transformers)(\..*)?"),
    ("py:.*", r"(torch|numpy|np|pydantic|collections|typing|pathlib|enum|os|pd|pandas|nn|abc|Tensor|Field|Ge)(\..*)?"),
    # Type aliases, which signatures show by name; the descriptions of the arguments say what they allow.
    ("py:class", "|".join(_ALIASES.split())),
    # Classes that users never build: the parts of a packed layer.
    ("py:class", "HandedOn|IntegerForm"),
    # A bound within an annotation, ``Field(le=0.5)``.
    ("py:class", r"0\.5"),
]


PUBLIC = assemble.definitions()


def resolve(app, env, node, content):
    """Find what single backticks and short names in annotations refer to.

    They link to the one documented object whose name ends so. Other single backticks are code.
    """
    if node["reftype"] != "known" and node.get("refdomain") != "py":
        return None
    name, objects = node["reftarget"].removesuffix("()"), env.domains["py"].objects
    name = PUBLIC.get(name) or PUBLIC.get(f"lowbit.{name}") or name
    if node["reftype"] != "known" and name not in objects:
        name = name.rpartition(".")[2]
    matches = [full for full in objects if full == name or full.endswith("." + name)]
    if len(matches) != 1:
        return content if node["reftype"] == "known" else None
    found = objects[matches[0]]
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content, matches[0])


HIDDEN_COLON = "\ue000"


def before_napoleon(app, what, name, obj, options, lines):
    """Make plain docstrings safe for reStructuredText: ``|w|`` is no substitution, a property's colon no type."""
    for index, line in enumerate(lines):
        lines[index] = assemble.escape_bars(line)
    if what in ("property", "attribute") and lines:
        lines[0] = lines[0].replace(":", HIDDEN_COLON)


def after_napoleon(app, what, name, obj, options, lines):
    """Give properties their colon back."""
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def setup(app):
    """Register the default role of docstrings."""
    app.add_role("known", XRefRole(innernodeclass=nodes.literal))
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("config-inited", lambda app, config: config.html_static_path.append(str(app.srcdir / "_static")))
