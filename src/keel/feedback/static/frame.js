// What every page has: the switches of language and theme act at once, codes can be copied.
document.documentElement.classList.add("scripted");

for (const form of document.querySelectorAll("form[data-instant]")) {
  form.addEventListener("change", () => form.requestSubmit());
}

for (const button of document.querySelectorAll("button[data-copies]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copies).textContent.trim());
    button.textContent = button.dataset.done;
  });
}

for (const button of document.querySelectorAll("button[data-asks]")) {
  button.addEventListener("click", (event) => {
    if (!window.confirm(button.dataset.asks)) event.preventDefault();
  });
}
