// Draws the charts in the colours of the page, anew when these change or the page is printed.
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function draw(onDark) {
  const ink = onDark ? "#e6e9ed" : "#1b1f24", grid = onDark ? "#39414b" : "#d5dae0";
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid };
  charts.forEach((chart, i) => {
    const { xaxis, yaxis, ...rest } = chart.layout;
    const titled = (own) => ({ ...axis, ...own, title: { text: (own || {}).title || "" } });
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 }, height: 360,
      margin: { l: 60, r: 16, t: 16, b: 48 }, hovermode: "closest",
      legend: { orientation: "h", yanchor: "bottom", y: 1.0, x: 0 },
      ...rest, xaxis: titled(xaxis), yaxis: { automargin: true, ...titled(yaxis) },
    };
    Plotly.react(`chart-${i}`, chart.traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  });
}

draw(dark.matches);
dark.addEventListener("change", (event) => draw(event.matches));
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  draw(false);
});
window.addEventListener("afterprint", () => draw(dark.matches));
