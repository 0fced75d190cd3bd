"""How Sphinx draws the site that build.py lays out; nothing is fetched, neither now nor by a reader's browser."""

import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
_settings = ConfigParser(delimiters=["="])
_settings.read(HERE.parents[1] / "settings.ini", encoding="utf-8")
_settings = _settings["DEFAULT"]

project = _settings["title"]
author = _settings["author"]
copyright = _settings["copyright"]
release = version = _settings["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "mermaid",
]

# Notebooks: the stored outputs are shown, nothing is executed.
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"  # tables in outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

# Reference: Google docstrings, with our section for papers.
autosummary_generate = False
add_module_names = False
default_role = "code"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style")]

# Vendored, so that the site works from a folder without a network.
mathjax_path = "mathjax/tex-svg.js"
mathjax_options = {"defer": "defer"}

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["../_static", "static"]
html_favicon = "static/favicon.svg"
html_css_files = ["ecomrec.css"]
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_sidebars = {"index": [], "project/*": [], "search": []}
html_theme_options = {
    "logo": {"text": project, "image_light": "_static/favicon.svg", "image_dark": "_static/favicon.svg"},
    "header_links_before_dropdown": 10,
    "navigation_with_keys": False,
    "show_nav_level": 2,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
