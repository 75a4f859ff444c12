// Runs in a page that headless Chromium shows; sends what the tests check to the page around it.
// The contrast is that of WCAG 2: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
"use strict";

function channels(color) {
  const found = color.match(/[\d.]+/g);
  return found ? found.map(Number) : null;
}

function luminance(color) {
  const [red, green, blue] = color.slice(0, 3).map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(first, second) {
  const [low, high] = [luminance(first), luminance(second)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

function background(element) {
  // A text of a cell of the confusion matrix is on the rectangle before it.
  const before = element.previousElementSibling;
  if (element.tagName === "text" && element.style.fill && before && before.tagName === "rect") {
    return channels(getComputedStyle(before).fill);
  }
  for (let each = element; each; each = each.parentElement) {
    const color = channels(getComputedStyle(each).backgroundColor);
    if (color && (color.length < 4 || color[3] > 0)) return color;
  }
  return [255, 255, 255];
}

function texts() {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const words = walker.currentNode.textContent.trim();
    if (!words || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const color = channels(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
    found.push({ ratio: contrast(color, background(element)), words: words.slice(0, 40) });
  }
  return found;
}

function names(selector) {
  return [...document.querySelectorAll(selector)].map(
    (each) => each.getAttribute("alt") || each.getAttribute("aria-label") || "",
  );
}

function focusOutline() {
  const link = document.querySelector("nav a");
  link.focus({ focusVisible: true });
  return getComputedStyle(link).outlineStyle;
}

window.addEventListener("load", () => {
  const open = [...document.querySelectorAll("details")];
  const first = document.querySelector("main img, main svg[role=img]");
  const result = {
    width: window.innerWidth,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
    first_image: first ? Math.round(first.getBoundingClientRect().top + window.scrollY) : null,
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((each) =>
      Number(each.tagName[1]),
    ),
    images: names("img, svg[role=img]"),
    scrolling: names("[tabindex]:not(pre), nav"),
    rows: [...document.querySelectorAll("tr")].filter((each) => each.checkVisibility()).length,
    broken_anchors: [...document.querySelectorAll("nav a")].filter(
      (each) => !document.querySelector(each.getAttribute("href")),
    ).length,
    focus: focusOutline(),
  };
  open.forEach((each) => (each.open = true)); // what is on demand is read, too
  result.low_contrast = texts().filter((each) => each.ratio < 4.5);
  result.num_texts = texts().length;
  result.overflow_open =
    document.documentElement.scrollWidth - document.documentElement.clientWidth;
  parent.postMessage(result, "*");
});
