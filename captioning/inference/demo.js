let shown = null;

/** Show the words of a new caption, and no map of an old one. */
function update() {
  const caption = document.getElementById("caption");
  const news = document.querySelector("#caption :is(.done, [role=alert])") ?? document.querySelector("#picture img");
  if (caption) {  // a screen reader waits until it is finished
    caption.ariaLive = "polite";
    caption.ariaBusy = String(Boolean(caption.querySelector(".caption:not(.done)")));
  }
  // On a phone the caption is below the screen; where it is, is known when the image has its size
  if (news && news !== shown) {
    Promise.resolve(news.decode?.()).then(() => caption.scrollIntoView({block: "nearest"}), () => {});
  }
  shown = news;
  const stage = document.querySelector("#picture .stage"), words = document.querySelector("#details .words");
  if (stage && !words) stage.querySelector("canvas")?.remove();
  if (!stage || !words?.dataset.maps) return;
  const maps = JSON.parse(words.dataset.maps);
  delete words.dataset.maps;
  stage.querySelector("canvas")?.remove();
  words.replaceChildren(...attention(maps, stage, stage.querySelector("img")));
}

new MutationObserver(update).observe(document.documentElement, {childList: true, subtree: true});
