"use strict";

function drawPictures() {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const style = getComputedStyle(document.documentElement);
  for (const place of document.querySelectorAll("[data-figure]")) {
    const { data, layout } = coloured(figures[place.dataset.figure], style);
    Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
  }
}

function drawAllArrows() {
  document.querySelectorAll(".pipeline").forEach(drawArrows);
}

document.documentElement.classList.add("drawn");  // else, and on paper, the still pictures are shown
drawAllArrows();
drawPictures();
addEventListener("resize", drawAllArrows);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPictures);
