// Draws the page's diagrams in its theme, and again when the reader changes the theme.
(() => {
  const root = document.documentElement;
  const diagrams = [...document.querySelectorAll("pre.mermaid")].map((box) => [box, box.textContent]);
  let drawn = null;
  const draw = async () => {
    const theme = root.dataset.theme === "dark" ? "dark" : "neutral";
    if (theme === drawn) return;
    drawn = theme;
    mermaid.initialize({ startOnLoad: false, theme, fontFamily: "system-ui, sans-serif" });
    for (const [box, text] of diagrams) {
      box.removeAttribute("data-processed");
      box.textContent = text;
    }
    await mermaid.run({ nodes: diagrams.map(([box]) => box) });
  };
  new MutationObserver(draw).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  draw();
})();
