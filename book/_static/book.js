document.addEventListener("DOMContentLoaded", () => {
  // The theme binds only the first button of the menu, which adaptive_margins.css hides with the bar across the top. The others
  // pass their clicks on to it.
  for (const name of ["primary-toggle", "secondary-toggle"]) {
    const [first, ...others] = document.querySelectorAll(`button.${name}`);
    for (const button of others) {
      button.addEventListener("click", () => first.click());
    }
  }
  // A name has to contain the text that is shown, so that it can be spoken.
  for (const button of document.querySelectorAll("button[aria-label]")) {
    if (button.innerText.trim()) {
      button.setAttribute("aria-label", button.innerText.replace(/\s+/g, " ").trim());
    }
  }
  // Copying (clipboard.js) takes the focus to the end of the page.
  document.addEventListener("click", event => event.target.closest("button.copybtn")?.focus());
  addEventListener("load", makeScrollable);
  addEventListener("resize", makeScrollable);
  window.MathJax?.startup?.promise?.then(makeScrollable);
});

// What scrolls sideways can be reached and named by the keyboard, and its edge fades where more is out of sight.
function makeScrollable() {
  for (const element of document.querySelectorAll("article :is(figure, pre, div, mjx-container)")) {
    const scrolls = element.scrollWidth > element.clientWidth && /auto|scroll/.test(getComputedStyle(element).overflowX);
    const more = () => {
      element.classList.toggle("am-more", scrolls && element.scrollLeft + element.clientWidth < element.scrollWidth - 1);
    };
    element.onscroll = scrolls ? more : null;
    more();
    if (scrolls && element.tabIndex < 0) {
      element.tabIndex = 0;
      if (element.tagName === "DIV" && !element.hasAttribute("role")) {
        element.setAttribute("role", "region");
        element.setAttribute("aria-label", "Scrolls sideways");
      }
    }
  }
}
