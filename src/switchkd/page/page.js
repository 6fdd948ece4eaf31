// From token to token with the arrow keys; everything else of the page works without a script.
document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const text = event.target.closest && event.target.closest(".completion");
  if (!step || !text) return;
  const tokens = [...text.querySelectorAll(".k")];
  const next = tokens[tokens.indexOf(event.target) + step] || tokens[step > 0 ? 0 : tokens.length - 1];
  if (next) { next.focus(); event.preventDefault(); }
});
