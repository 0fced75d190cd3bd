"""A directive for mermaid diagrams, drawn by the vendored script over http and from a folder alike."""

from html import escape

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Diagram(nodes.General, nodes.Element):
    """The text of one diagram."""


class Mermaid(SphinxDirective):
    has_content = True

    def run(self):
        return [Diagram(text="\n".join(self.content))]


def draw(writer, node):
    writer.body.append(f'<pre class="mermaid" role="img">{escape(node["text"])}</pre>\n')
    raise nodes.SkipNode


def load(app, page, template, context, tree):
    """Only pages that hold a diagram load the script, which has 3 MB."""
    if tree is not None and any(tree.findall(Diagram)):
        app.add_js_file("mermaid/mermaid.min.js", loading_method="defer")
        app.add_js_file("diagrams.js", loading_method="defer")


def setup(app):
    app.add_node(Diagram, html=(draw, None))
    app.add_directive("mermaid", Mermaid)
    app.connect("html-page-context", load)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
