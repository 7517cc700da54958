/* The theme binds only the first button of the menu, which layout.css hides with the bar across the top. The others pass
   their clicks on to it. */
document.addEventListener("DOMContentLoaded", () => {
  const [first, ...others] = document.querySelectorAll(".primary-toggle");
  for (const button of others) {
    button.addEventListener("click", () => first.click());
  }
});
