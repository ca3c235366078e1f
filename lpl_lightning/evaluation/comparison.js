"use strict";
(() => {
  const viewer = document.getElementById("viewer");
  if (!viewer) return;
  const find = (id) => document.getElementById(id);
  const [run, image, at] = ["run", "image", "at"].map(find);
  const frame = viewer.querySelector(".frame");
  const [lower, upper] = [".lower", ".upper"].map((name) => viewer.querySelector(name));
  const figures = [...document.querySelectorAll(".same figure")];
  // The pictures on the page are the only copies of the images.
  const pictures = figures.map((figure) => [...figure.querySelectorAll("img")]);

  const slide = () => {
    frame.style.setProperty("--at", `${at.value}%`);
    at.setAttribute("aria-valuetext", `${Math.round(at.value)} % ${find("left").textContent}`);
  };
  const sharpen = (picture) => {
    // Enlarged pixel by pixel: smoothing would hide what differs.
    picture.classList.toggle("pixels", picture.naturalWidth > 0 && picture.clientWidth >= 1.5 * picture.naturalWidth);
  };
  const show = () => {
    const index = Number(image.value);
    const other = Number(run.value);
    upper.src = pictures[index][0].src;
    lower.src = pictures[index][other].src;
    upper.alt = pictures[index][0].alt;
    lower.alt = pictures[index][other].alt;
    find("right").textContent = run.selectedOptions[0].textContent;
    find("right").className = run.selectedOptions[0].className;
    find("caption").textContent = figures[index].dataset.caption;
    figures.forEach((figure, number) => figure.classList.toggle("chosen", number === index));
    slide();
  };
  const step = (by) => {
    image.value = String((Number(image.value) + by + figures.length) % figures.length);
    show();
  };

  at.addEventListener("input", slide);
  run.addEventListener("change", show);
  image.addEventListener("change", show);
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  figures.forEach((figure, number) => {
    figure.querySelector(".row").addEventListener("click", () => {
      image.value = String(number);
      show();
      viewer.scrollIntoView({ block: "nearest" });
    });
  });
  const all = [lower, upper, ...pictures.flat()];
  all.forEach((picture) => picture.addEventListener("load", () => sharpen(picture)));
  window.addEventListener("resize", () => all.forEach(sharpen));
  all.forEach(sharpen);
  find("controls").hidden = viewer.hidden = false;
  // Browsers keep what was chosen when a page is loaded again.
  show();
})();
