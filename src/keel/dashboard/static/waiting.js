// Looks whether the run has begun, and shows it then.
async function look() {
  try {
    const answer = await fetch("/api/runs");
    if (answer.ok && (await answer.json()).runs.length) location.reload();
  } catch {
    // the server is gone, or not yet there again
  }
}
setInterval(look, 1000);
