/* The browser's storage, which a person may have switched off: then nothing is remembered and nothing breaks. */

function guarded(name) {
  const use = (work, otherwise) => {
    try {
      return work(window[name]);
    } catch {
      return otherwise;
    }
  };
  return {
    get: (key) => use((store) => store.getItem(key), null),
    /** Returns whether the text is kept now. */
    set: (key, text) => use((store) => (store.setItem(key, text), true), false),
    remove: (key) => use((store) => store.removeItem(key)),
  };
}

export const device = guarded("localStorage");
export const tab = guarded("sessionStorage");
