/* Runs before the first paint, so that a remembered theme does not flash. */
(() => {
  const theme = localStorage.getItem("hasten.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
