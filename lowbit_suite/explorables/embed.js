// For a page without a kernel: puts the live explorable in the place of each <... data-explorable="NAME">, whose content
// (the picture of the stored output) stays where that fails.

/** The part of anywidget's model that a page without a kernel can have: values that nobody else changes. */
export function standInModel(values = {}) {
  return {
    get: (key) => values[key],
    set: (key, value) => (values[key] = value),
    save_changes() {},
    on() {},
    off() {},
  };
}

for (const place of document.querySelectorAll("[data-explorable]")) {
  const name = place.dataset.explorable, live = document.createElement("div");
  import(new URL(`./${name}.js`, import.meta.url).href)
    .then(({ render }) => {
      place.after(live); // on the page, so that it has a width
      render({ model: standInModel(), el: live });
      place.replaceChildren(live);
    })
    .catch((error) => {
      live.remove();
      console.error(`explorable ${name}:`, error);
    });
}
